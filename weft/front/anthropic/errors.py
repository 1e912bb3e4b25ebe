"""Anthropic's error form, `{"type": "error", "error": {type, message}, "request_id"}`, with its own words for a status.

What would be 503 in OpenAI's form is 529 here, `overloaded_error`, which Anthropic's clients try again after a pause.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from weft.front.openai.calls import fresh_id
from weft.front.openai.errors import error_payload, headers_of, status_of

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
OVERLOADED = 529


def anthropic_payload(error: BaseException) -> tuple[int, dict[str, Any]]:
    """(status, JSON object) of an error."""
    status = status_of(error)
    status = OVERLOADED if status == 503 else status
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    told = {"type": kind, "message": error_payload(error)["error"]["message"]}
    return status, {"type": "error", "error": told, "request_id": fresh_id("req_")}


class AnthropicForm:
    """How an answer of these routes says that it failed (`openai.answer.Form`)."""

    done = b""

    def response(self, error: BaseException, headers: dict[str, str] | None = None) -> Response:
        status, payload = anthropic_payload(error)
        extra = {**headers_of(error), **(headers or {}), "request-id": payload["request_id"]}
        return Response(msgspec.json.encode(payload), status, media_type="application/json", headers=extra)

    def event(self, error: BaseException) -> bytes:
        return b"event: error\ndata: " + msgspec.json.encode(anthropic_payload(error)[1]) + b"\n\n"


ANTHROPIC = AnthropicForm()
