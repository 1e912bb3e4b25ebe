"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from weft.front.openai.service import Service
from weft.front.openai.services import Services


def model_object(service: Service, name: str) -> dict[str, Any]:
    """One model in OpenAI's shape.  vLLM's additions: `root`, `parent` (the model that an adapter changes), `max_model_len`."""
    adapter = name not in service.model_ids
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "weft",
        "root": name if adapter else service.port.info.model_id,
        "parent": service.model_ids[0] if adapter else None,
        "max_model_len": service.port.info.max_model_len,
    }


def list_models(services: Services) -> dict[str, Any]:
    return {"object": "list", "data": [model_object(service, name) for service in services for name in service.names]}


def get_model(services: Services, name: str) -> dict[str, Any]:
    """RequestError (404) when there is no such model."""
    service = services.of(name)
    return model_object(service, service.resolve(name))
