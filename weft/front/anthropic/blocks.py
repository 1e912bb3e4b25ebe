"""The content of a message as it grows: a list of blocks, one of them open at most, and the events that tell of each.

Source of the shapes and of the order of events: Anthropic's API reference, "Messages" and "Streaming messages".
"""

from __future__ import annotations

import json
from typing import Any

from weft.front.openai.spoken import Arguments, Begun, Broken, Ended, Said, Text, Thought

Told = tuple[str, dict[str, Any]]
"""Name of an event and what it says."""


class Blocks:
    """content: what there is, the open block last."""

    def __init__(self) -> None:
        self.content: list[dict[str, Any]] = []
        self._open = False
        self._pieces: list[str] = []
        self._count = 0

    def take(self, said: list[Said]) -> list[Told]:
        """What a delta adds."""
        told: list[Told] = []
        for one in said:
            match one:
                case Text(text) | Broken(_, text):
                    told += self._drop() if isinstance(one, Broken) else []
                    told += self._begin({"type": "text", "text": ""})
                    told += self._add({"type": "text_delta", "text": text}, text)
                case Thought(text):
                    told += self._begin({"type": "thinking", "thinking": "", "signature": ""})
                    told += self._add({"type": "thinking_delta", "thinking": text}, text)
                case Begun(_, id, name):
                    told += self.close() + self._begin({"type": "tool_use", "id": id, "name": name, "input": {}})
                case Arguments(_, text):
                    told += self._add({"type": "input_json_delta", "partial_json": text}, text)
                case Ended():
                    told += self.close()
        return told

    def finish(self) -> list[Told]:
        """The answer has ended; where it said nothing, that is a block without text."""
        return ([] if self.content else self._begin({"type": "text", "text": ""})) + self.close()

    def close(self) -> list[Told]:
        """The open block is whole, or as far as it comes."""
        if not self._open:
            return []
        block, text = self.content[-1], "".join(self._pieces)
        self._open, self._pieces = False, []
        if block["type"] == "tool_use":
            block["input"] = _arguments(text)
        else:
            block[block["type"]] = text
        return [("content_block_stop", {"index": self._count - 1})]

    def _begin(self, block: dict[str, Any]) -> list[Told]:
        """A block of this type is open from now on; text and thoughts that are open already go on."""
        if self._open and self.content[-1]["type"] == block["type"] != "tool_use":
            return []
        told = self.close()
        self.content.append(block)
        self._open, self._count = True, self._count + 1
        told.append(("content_block_start", {"index": self._count - 1, "content_block": dict(block)}))
        return told if self._count > 1 else [*told, ("ping", {})]

    def _add(self, delta: dict[str, Any], text: str) -> list[Told]:
        self._pieces.append(text)
        return [("content_block_delta", {"index": self._count - 1, "delta": delta})] if text else []

    def _drop(self) -> list[Told]:
        """A call that did not become one: a stream has told of its beginning, the content does not hold it."""
        told = self.close()
        self.content.pop()
        return told


def _arguments(text: str) -> Any:
    """Arguments as an object; of a call that was cut short, none."""
    try:
        return json.loads(text) if text else {}
    except ValueError:
        return {}
