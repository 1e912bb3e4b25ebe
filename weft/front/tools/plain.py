"""Calls as plain JSON: `{"name": ..., "arguments": {...}}`, or a list of such objects, as the answer or in a fence.

For models whose template knows no tools: this is the form that `fallback` asks them for.
"""

from __future__ import annotations

from weft.front.tools.form import Form
from weft.front.tools.machine import Machine, Reading


class Plain(Machine):
    name = "json"
    form = Form(call='{"name": "NAME", "arguments": ARGUMENTS}')
    markers = ("```json",)
    openings = "{["

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
