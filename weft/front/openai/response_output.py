"""The output of a response as it grows: a list of items, one of them open at most, and the events that tell of each.

Source of the shapes and of the order of events: OpenAI's API reference, "Responses" and "Streaming events".
"""

from __future__ import annotations

from typing import Any

from weft.front.openai.calls import fresh_id
from weft.front.openai.logprobs import ChatToken
from weft.front.openai.response_items import text_part
from weft.front.openai.spoken import Arguments, Begun, Broken, Ended, Said, Text, Thought

Told = tuple[str, dict[str, Any]]
"""Name of an event and what it says."""


class ResponseOutput:
    """items: what there is, the open one last."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []
        self._logprobs: list[ChatToken] = []
        self._later: list[ChatToken] = []
        self._count = 0

    def take(self, said: list[Said], logprobs: list[ChatToken]) -> list[Told]:
        """What a delta adds.  logprobs: of its tokens; they go with the next text."""
        self._later += logprobs
        told: list[Told] = []
        for one in said:
            match one:
                case Text(text) | Broken(_, text):
                    told += self._drop() if isinstance(one, Broken) else []
                    told += self._text(text)
                case Thought(text):
                    told += self._begin("reasoning")
                    told.append(("response.reasoning_text.delta", {**self._place(), "content_index": 0, "delta": text}))
                    self._pieces.append(text)
                case Begun(_, id, name):
                    told += self.close("completed") + self._begin("function_call", call_id=id, name=name, arguments="")
                case Arguments(_, text):
                    told.append(("response.function_call_arguments.delta", {**self._place(), "delta": text}))
                    self._pieces.append(text)
                case Ended():
                    told += self.close("completed")
        return told

    def finish(self, status: str) -> list[Told]:
        """The answer has ended; where it said nothing, that is a message without text."""
        told = [] if self.items and not self._later else self._text("")
        return told + self.close(status)

    def close(self, status: str) -> list[Told]:
        """The open item is whole, or as far as it comes."""
        item, text = self._open, "".join(self._pieces)
        if item is None:
            return []
        place = self._place()
        item["status"] = status
        self._open, self._pieces = None, []
        done = ("response.output_item.done", {"output_index": place["output_index"], "item": item})
        if item["type"] == "function_call":
            item["arguments"] = text
            what = {**place, "name": item["name"], "arguments": text}
            return [("response.function_call_arguments.done", what), done]
        place["content_index"] = 0
        if item["type"] == "reasoning":
            part = {"type": "reasoning_text", "text": text}
            whole = ("response.reasoning_text.done", {**place, "text": text})
        else:
            logprobs, self._logprobs = self._logprobs, []
            part = text_part(text, logprobs)
            whole = ("response.output_text.done", {**place, "text": text, "logprobs": logprobs})
        item["content"] = [part]
        return [whole, ("response.content_part.done", {**place, "part": part}), done]

    def _text(self, text: str) -> list[Told]:
        told = self._begin("message", role="assistant")
        logprobs, self._later = self._later, []
        self._logprobs += logprobs
        self._pieces.append(text)
        if text or logprobs:
            what = {**self._place(), "content_index": 0, "delta": text, "logprobs": logprobs}
            told.append(("response.output_text.delta", what))
        return told

    def _begin(self, kind: str, **fields: Any) -> list[Told]:
        """An item of this kind is open from now on; messages and thoughts that are open already go on."""
        if self._open is not None and self._open["type"] == kind and kind != "function_call":
            return []
        told = self.close("completed")
        item: dict[str, Any] = {"id": fresh_id(PREFIXES[kind]), "type": kind, **fields, "status": "in_progress"}
        if kind != "function_call":
            item["content"] = []
        if kind == "reasoning":
            item["summary"] = []
        self.items.append(item)
        self._open, self._count = item, self._count + 1
        told.append(("response.output_item.added", {"output_index": self._count - 1, "item": dict(item)}))
        if kind != "function_call":
            part = text_part("", []) if kind == "message" else {"type": "reasoning_text", "text": ""}
            told.append(("response.content_part.added", {**self._place(), "content_index": 0, "part": part}))
        return told

    def _drop(self) -> list[Told]:
        """A call that did not become one: a stream has told of its beginning, the output does not hold it."""
        told = self.close("incomplete")
        self.items.pop()
        return told

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": self._count - 1}


PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
