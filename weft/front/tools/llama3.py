"""Llama 3.1, 3.2, 3.3: `{"name": ..., "parameters": {...}}` as the whole answer, behind `<|python_tag|>` or without it.

Source: Meta's prompt format and the templates.  Several calls are parted by semicolons, as vLLM reads them too.  What a
model sends to its built-in tools (`<|python_tag|>brave_search.call(...)`, Python code) is text.
"""

from __future__ import annotations

from collections.abc import Sequence

from weft.front.tools.machine import Call, Machine, Reading, to_json


class Llama3(Machine):
    name = "llama3_json"
    markers = ("<|python_tag|>",)
    openings = "{"
    special = markers

    @staticmethod
    def written(calls: Sequence[Call]) -> str:
        return "; ".join(f'{{"name": {to_json(name)}, "parameters": {to_json(given)}}}' for name, given in calls)

    def calls(self, marker: str) -> Reading[None]:
        char = marker if marker in self.openings else (yield from self.solid())
        if char != "{":
            self.fail(char)
        yield from self.object()
        while (yield from self.separated(";", "{")):
            yield from self.object()
