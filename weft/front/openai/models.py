"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from weft.front.openai.service import Service


def model_object(service: Service, name: str) -> dict[str, Any]:
    """One model in OpenAI's shape; `root` and `max_model_len` are vLLM's additions."""
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "weft",
        "root": service.port.info.model_id,
        "max_model_len": service.port.info.max_model_len,
    }


def list_models(service: Service) -> dict[str, Any]:
    return {"object": "list", "data": [model_object(service, name) for name in service.model_ids]}


def get_model(service: Service, name: str) -> dict[str, Any]:
    """RequestError (404) when there is no such model."""
    return model_object(service, service.resolve(name))
