"""OpenAI's error form, `{"error": {message, type, param, code}}`, and which of weft's errors becomes which status.

RequestError      400, or what its code says: 401, 403, 404, 405, 408, 409, 413, 415, 429, 501
CapacityError     503, as it may be taken later (code "too_late": its first token could not come in time any more); 400 with the
                  code "never_fits", 507 with "storage_full"
EngineStopped     503, the engine is gone
GenerationFailed  500 of the type engine_error: the engine could not go on with this one
anything else     500, and no detail: the text of an unexpected error is for the log, never for a client
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
from starlette.responses import Response

from weft.errors import CapacityError, EngineError, RequestError
from weft.front.generation import EngineStopped, GenerationFailed

STATUS_OF_CODE = {
    "invalid_api_key": 401,
    "forbidden": 403,
    "host_not_allowed": 403,
    "origin_not_allowed": 403,
    "model_not_found": 404,
    "adapter_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "timeout": 408,
    "adapter_in_use": 409,
    "conflict": 409,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "invalid_adapter": 400,
    "rate_limit_exceeded": 429,
    "loading": 503,
    "draining": 503,
    "no_store": 501,
}
CAPACITY = {"never_fits": 400, "storage_full": 507, "too_late": 503}
INTERNAL = "weft failed on this request; the server's log says why"


def status_of(error: BaseException) -> int:
    """HTTP status of an error."""
    if isinstance(error, RequestError):
        return STATUS_OF_CODE.get(error.code or "", 400)
    if isinstance(error, CapacityError):
        return CAPACITY.get(getattr(error, "code", None) or "", 503)
    if isinstance(error, EngineStopped):
        return 503
    return 500


def passes(error: BaseException) -> bool:
    """Whether the same request may be taken later: who is in no hurry waits, and asks again."""
    return isinstance(error, EngineError) and status_of(error) in (429, 503)


def error_payload(error: BaseException) -> dict[str, Any]:
    """The JSON object for an error, as OpenAI's clients read it."""
    status = status_of(error)
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 401:
        kind = "authentication_error"
    elif status == 429:
        kind = "rate_limit_error"
    elif status == 503:
        kind = "service_unavailable"
    elif isinstance(error, GenerationFailed):
        kind = "engine_error"
    code = getattr(error, "code", None)
    if isinstance(error, CapacityError):
        code = code or "overloaded"
    elif isinstance(error, EngineStopped):
        code = "engine_stopped"
    return {
        "error": {
            "message": str(error) if isinstance(error, EngineError) else INTERNAL,
            "type": kind,
            "param": getattr(error, "param", None),
            "code": code,
        }
    }


def error_response(error: BaseException, headers: dict[str, str] | None = None) -> Response:
    """The whole HTTP answer for an error."""
    return Response(
        msgspec.json.encode(error_payload(error)),
        status_code=status_of(error),
        media_type="application/json",
        headers={**headers_of(error), **(headers or {})},
    )


def headers_of(error: BaseException) -> dict[str, str]:
    """What the head of an error's answer says, in whatever form that is."""
    status = status_of(error)
    if status == 401:
        return {"www-authenticate": "Bearer"}
    if status in (429, 503):
        return {"retry-after": str(math.ceil(getattr(error, "retry_s", 1.0)))}
    if status in (408, 413):
        return {"connection": "close"}  # the rest of the body was not read, so the connection can't be used again
    return {}
