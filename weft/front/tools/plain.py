"""Calls as plain JSON: `{"name": ..., "arguments": {...}}`, or a list of such objects, as the answer or in a fence.

For models whose template knows no tools: this is the form that `fallback` asks them for.
"""

from __future__ import annotations

from collections.abc import Sequence

from weft.front.tools.machine import Call, Machine, Reading, to_json


class Plain(Machine):
    name = "json"
    markers = ("```json",)
    openings = "{["

    @staticmethod
    def written(calls: Sequence[Call]) -> str:
        said = [f'{{"name": {to_json(name)}, "arguments": {to_json(given)}}}' for name, given in calls]
        return said[0] if len(said) == 1 else f"[{', '.join(said)}]"

    def calls(self, marker: str) -> Reading[None]:
        char = marker if marker in self.openings else (yield from self.solid())
        if char == "[":
            yield from self.listed()
        elif char == "{":
            yield from self.object()
            while (yield from self.separated(";", "{")):
                yield from self.object()
        else:
            self.fail(char)
        if marker == "```json":
            yield from self.optional("```")
