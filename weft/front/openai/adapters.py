"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them: adapters come and go while the server runs."""

from __future__ import annotations

from starlette.responses import PlainTextResponse

from weft.errors import RequestError
from weft.front.openai.service import Service
from weft.front.openai.structs import LoadRequest, UnloadRequest, read


async def load_adapter(service: Service, body: bytes) -> PlainTextResponse:
    """Take in a folder below --lora-root under a name, which requests then use as their model.  Raises RequestError."""
    _allowed(service)
    request = read(body, LoadRequest, lenient=service.lenient)
    if not request.lora_path:
        raise RequestError("lora_path is missing; give the adapter's folder", param="lora_path")
    name = _name(request.lora_name)
    if name in service.model_ids:
        raise RequestError(f"{name!r} is the name of the model itself; give the adapter another", param="lora_name")
    await service.client.load_adapter(name, request.lora_path)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload_adapter(service: Service, body: bytes) -> PlainTextResponse:
    """Let go of an adapter that no live request uses.  Raises RequestError."""
    _allowed(service)
    name = _name(read(body, UnloadRequest, lenient=service.lenient).lora_name)
    await service.client.drop_adapter(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _allowed(service: Service) -> None:
    if not service.port.info.loads_adapters:
        raise RequestError(
            "this server loads and drops no adapters: start it with --lora-root and the folder that they stand in",
            code="forbidden",
        )


def _name(name: str | None) -> str:
    if not name:
        raise RequestError("lora_name is missing; give the adapter's name", param="lora_name")
    return name
