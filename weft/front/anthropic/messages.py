"""POST /v1/messages and /v1/messages/count_tokens.

Source of the shapes and of the order of events: Anthropic's API reference, "Messages" and "Streaming messages".
"""

from __future__ import annotations

from typing import Any

import msgspec

from weft.front.anthropic.blocks import Blocks, Told
from weft.front.anthropic.errors import ANTHROPIC
from weft.front.anthropic.structs import NEUTRAL, CountRequest, MessagesRequest
from weft.front.generation import Delta, Generation
from weft.front.openai.answer import JSONAnswer, StreamAnswer
from weft.front.openai.calls import Call, fresh_id
from weft.front.openai.chat import chat_ids, chat_prompt
from weft.front.openai.own import label
from weft.front.openai.spoken import Spoken
from weft.front.openai.structs import read
from weft.front.openai.unknown import ANTHROPIC as ANTHROPIC_HARMLESS
from weft.front.timeline import said

ASKED = ANTHROPIC_HARMLESS.union(MessagesRequest.__struct_fields__)
"""What else stands in a request whose tokens are to be counted: it changes nothing of them."""
encode = msgspec.json.encode


async def create_message(call: Call) -> JSONAnswer | StreamAnswer:
    """POST /v1/messages.  Raises RequestError."""
    service = call.service
    request = read(call.body, MessagesRequest, NEUTRAL, lenient=service.lenient, harmless=ANTHROPIC_HARMLESS)
    chat = request.chat_request()
    model, prompt = await chat_prompt(service, chat)
    generation = await service.start(chat, prompt)
    told = label(chat, service.port.info.stack, service.techniques(model), prompt.params.grammar)
    writer = MessageWriter(model, generation, request.max_tokens or 0, told)
    return (StreamAnswer if request.stream else JSONAnswer)(generation, writer, ANTHROPIC)


async def count_tokens(call: Call) -> dict[str, int]:
    """POST /v1/messages/count_tokens: what the conversation has by the model's own template.  Raises RequestError."""
    request = read(call.body, CountRequest, NEUTRAL, lenient=call.service.lenient, harmless=ASKED)
    call.service.resolve(request.model)
    return {"input_tokens": len(await chat_ids(call.service, request.as_chat()))}


class MessageWriter:
    """Deltas as a `message`, or as the events of one."""

    def __init__(self, model: str, generation: Generation, most: int, label: dict[str, Any] | None) -> None:
        self._generation, self._most, self._label = generation, most, label
        self._head = {"id": fresh_id("msg_"), "type": "message", "role": "assistant", "model": model}
        self._blocks, self._spoken = Blocks(), Spoken(generation.requests[0].prompt.manner)
        self._last: Delta | None = None

    # ------------------------------------------------------------------------------------------ stream

    def open(self) -> bytes:
        usage = {**_usage(self._generation), "output_tokens": 0}
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return _event("message_start", message=message)

    def events(self, deltas: list[Delta]) -> bytes:
        return b"".join(_event(kind, **fields) for kind, fields in self._take(deltas))

    def close(self, usage: dict[str, Any]) -> bytes:
        return (
            b"".join(_event(kind, **fields) for kind, fields in self._blocks.finish())
            + _event("message_delta", delta=self._stop(), usage=_usage(self._generation), **self._said())
            + _event("message_stop")
        )

    # ------------------------------------------------------------------------------------------ one body

    def gather(self, deltas: list[Delta]) -> None:
        self._take(deltas)

    def body(self, usage: dict[str, Any]) -> bytes:
        self._blocks.finish()
        whole = {**self._head, "content": self._blocks.content, **self._stop(), "usage": _usage(self._generation)}
        return encode({**whole, **self._said()})

    # ------------------------------------------------------------------------------------------ both

    def _take(self, deltas: list[Delta]) -> list[Told]:
        told: list[Told] = []
        for delta in deltas:
            told += self._blocks.take(self._spoken.read(delta))
            self._last = delta
        return told

    def _said(self) -> dict[str, Any]:
        return said(self._label, self._generation)

    def _stop(self) -> dict[str, Any]:
        last = self._last
        if last is None or last.finish_reason is None:
            return {"stop_reason": None, "stop_sequence": None}
        if isinstance(last.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": last.stop_reason}
        reason = "tool_use" if self._spoken.called else "end_turn"
        if last.finish_reason == "length":
            full = self._generation.completion_tokens < self._most
            reason = "model_context_window_exceeded" if full else "max_tokens"
        return {"stop_reason": reason, "stop_sequence": None}


def _usage(generation: Generation) -> dict[str, Any]:
    """Anthropic counts apart what came from the cache; how much that was is known at the end."""
    cached = generation.cached_tokens
    return {
        "input_tokens": generation.prompt_tokens - cached, "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached, "output_tokens": generation.completion_tokens,
    }  # fmt: skip


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind, **fields}) + b"\n\n"
