"""A response as it grows: the object that clients get, and the events of its stream with their sequence numbers.

Source of the shapes and of the order of events: OpenAI's API reference, "Responses" and "Streaming events".
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from weft.front.generation import Delta, Generation
from weft.front.openai.errors import error_payload
from weft.front.openai.logprobs import chat_logprobs
from weft.front.openai.response_output import ResponseOutput, Told
from weft.front.openai.response_structs import ResponseRequest
from weft.front.openai.spoken import Spoken
from weft.front.speech import Manner
from weft.front.timeline import said
from weft.front.tokenizer import Tokenizer
from weft.sampling import SamplingParams

encode = msgspec.json.encode


class ResponseObject:
    """One response.  Its `events` methods give server-sent events, one `bytes` each, numbered from 0."""

    def __init__(
        self,
        request: ResponseRequest,
        model: str,
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        id: str,
        created: int,
        kept: bool,
        label: dict[str, Any] | None = None,
        manner: Manner | None = None,
    ) -> None:
        self.id, self.status = id, "queued" if request.background else "in_progress"
        self._request, self._model, self._params, self._tokenizer = request, model, params, tokenizer
        self._created, self._label = created, label
        self.kept = kept
        self._output, self._spoken = ResponseOutput(), Spoken(manner)
        self._last: list[Told] = []
        self._completed: int | None = None
        self._usage: dict[str, Any] | None = None
        self._error: dict[str, Any] | None = None
        self._finish: str | None = None
        self._number = 0

    # ------------------------------------------------------------------------------------------ the object

    def object(self) -> dict[str, Any]:
        """The response as it stands."""
        request, params = self._request, self._params
        ended = self.status not in ("queued", "in_progress")
        chosen = "auto" if request.tool_choice is None else request.tool_choice
        own = {} if self._label is None else {"weft": self._label}
        return {
            "id": self.id, "object": "response", "created_at": self._created, "completed_at": self._completed,
            "status": self.status, "background": bool(request.background), "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "instructions": request.instructions, "max_output_tokens": request.max_output_tokens, "model": self._model,
            "output": self._output.items if ended else [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id, "reasoning": {"effort": None, "summary": None},
            "service_tier": "default", "store": self.kept, "temperature": params.temperature,
            "text": request.text or {"format": {"type": "text"}, "verbosity": "medium"}, "tool_choice": chosen,
            "tools": request.tools or [],
            "top_logprobs": request.top_logprobs or 0, "top_p": params.top_p, "truncation": "disabled",
            "metadata": request.metadata or {}, **({} if self._usage is None else {"usage": self._usage}), **own,
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------ how it grows

    def begin(self) -> list[bytes]:
        """The first token is there."""
        self.status = "in_progress"
        return [
            self._event("response.created", response=self.object()),
            self._event("response.in_progress", response=self.object()),
        ]

    def take(self, deltas: list[Delta]) -> list[bytes]:
        """More of it."""
        told: list[Told] = []
        for delta in deltas:
            found = chat_logprobs(self._tokenizer, delta.logprobs).content if self._request.with_logprobs else []
            told += self._output.take(self._spoken.read(delta), found)
            self._finish = delta.finish_reason or self._finish
        return [self._event(kind, **fields) for kind, fields in told]

    def end(self, generation: Generation) -> None:
        """The last token is there, or it was cancelled; `object` says so from now on."""
        self._used(generation)
        self.status = {"length": "incomplete", "stop": "completed"}.get(self._finish or "", "cancelled")
        self._completed = int(time.time()) if self.status == "completed" else None
        self._last = self._output.finish("completed" if self.status == "completed" else "incomplete")

    def fail(self, error: Exception, generation: Generation | None) -> list[bytes]:
        """It ends with an error."""
        told = error_payload(error)["error"]
        self.status, self._error = "failed", {"code": "server_error", "message": told["message"]}
        self._output.close("incomplete")
        if generation is not None:
            self._used(generation)
        return [self._event("response.failed", response=self.object())]

    def cancel(self) -> None:
        """It ends before it has begun."""
        self.status = "cancelled"

    def close(self) -> list[bytes]:
        """The events after the last token."""
        last = "response.incomplete" if self.status == "incomplete" else "response.completed"
        return [
            *(self._event(kind, **fields) for kind, fields in self._last),
            self._event(last, response=self.object()),
        ]

    def _used(self, generation: Generation) -> None:
        self._label = said(self._label, generation).get("weft")
        given, out = generation.prompt_tokens, generation.completion_tokens
        self._usage = {
            "input_tokens": given,
            "input_tokens_details": {"cached_tokens": generation.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": out,
            "output_tokens_details": {"reasoning_tokens": self._spoken.thought_tokens(generation)},
            "total_tokens": given + out,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        data = encode({"type": kind, "sequence_number": number, **fields})
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"
