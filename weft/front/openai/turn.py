"""`Turn`: one answer of a chat with thoughts and tool calls, as OpenAI's deltas, or as one message.

`reasoning_content` is DeepSeek's and vLLM's name for thoughts.  A call that is not whole: where the answer was cut by its
length, its arguments stay as far as they came, as OpenAI's do; else what the model wrote of it is told as text, and the
message has no such call (a stream has told of its beginning already).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from weft.front.generation import Delta
from weft.front.speech import Arguments, Begun, Broken, Ended, Manner, Said, Text, Thought


class Turn:
    """Reads deltas of one sequence."""

    def __init__(self, manner: Manner) -> None:
        self._speech = manner.open()
        self._whole = 0
        self._text: list[str] = []
        self._thought: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def read(self, delta: Delta) -> list[dict[str, Any]]:
        """What a delta adds, as the `delta` objects of chunks."""
        return [self._piece(one) for one in self._said(delta)]

    def gather(self, delta: Delta) -> None:
        """Keep what a delta adds for `message`."""
        for one in self._said(delta):
            self._keep(one)

    def reason(self, delta: Delta) -> str | None:
        """Why the answer ended."""
        return "tool_calls" if self._whole and delta.finish_reason == "stop" else delta.finish_reason

    def message(self) -> dict[str, Any]:
        """The whole answer."""
        text = "".join(self._text)
        message: dict[str, Any] = {"role": "assistant", "content": None if self._calls and not text else text}
        message["refusal"] = None
        if self._thought:
            message["reasoning_content"] = "".join(self._thought)
        if self._calls:
            for call in self._calls:
                call["function"]["arguments"] = "".join(call["function"]["arguments"])
            message["tool_calls"] = self._calls
        return message

    def thought_tokens(self, offsets: Sequence[int]) -> int:
        """Tokens of the thought and its marks.  offsets: of all tokens in the text."""
        return bisect_left(offsets, self._speech.thought_chars)

    def _said(self, delta: Delta) -> list[Said]:
        said = self._speech.push(delta.text)
        if delta.finish_reason is not None:
            said += self._speech.finish()
        self._whole += sum(isinstance(one, Ended) for one in said)
        by_length = delta.finish_reason == "length"
        return [
            one
            for one in said
            if not isinstance(one, Ended) and not (isinstance(one, Broken) and one.cut and by_length)
        ]

    def _piece(self, one: Said) -> dict[str, Any]:
        match one:
            case Thought(text):
                return {"reasoning_content": text}
            case Begun(index, id, name):
                function = {"name": name, "arguments": ""}
                return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
            case Arguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case Text(text) | Broken(_, text):
                return {"content": text}
        raise AssertionError(one)

    def _keep(self, one: Said) -> None:
        match one:
            case Thought(text):
                self._thought.append(text)
            case Begun(_, id, name):
                self._calls.append({"id": id, "type": "function", "function": {"name": name, "arguments": []}})
            case Arguments(_, text):
                self._calls[-1]["function"]["arguments"].append(text)
            case Text(text):
                self._text.append(text)
            case Broken(_, text):
                self._calls.pop()
                self._text.append(text)
