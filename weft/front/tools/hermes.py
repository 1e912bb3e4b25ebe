"""Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, once for each call.

Source: the templates of Hermes 2 Pro and 3, Qwen 2.5 and 3.  The closing tag may be missing, as models forget it.
"""

from __future__ import annotations

from collections.abc import Sequence

from weft.front.tools.machine import Call, Machine, Reading, to_json


class Hermes(Machine):
    name = "hermes"
    markers = ("<tool_call>",)
    special = ("<tool_call>", "</tool_call>")

    @staticmethod
    def written(calls: Sequence[Call]) -> str:
        return "\n".join(
            f'<tool_call>\n{{"name": {to_json(name)}, "arguments": {to_json(given)}}}\n</tool_call>'
            for name, given in calls
        )

    def calls(self, marker: str) -> Reading[None]:
        char = yield from self.solid()
        if char != "{":
            self.fail(char)
        yield from self.object()
        yield from self.optional("</tool_call>")
