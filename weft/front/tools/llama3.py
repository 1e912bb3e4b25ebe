"""Llama 3.1, 3.2, 3.3: `{"name": ..., "parameters": {...}}` as the whole answer, behind `<|python_tag|>` or without it.

Source: Meta's prompt format and the templates.  Several calls are parted by semicolons, as vLLM reads them too.  What a
model sends to its built-in tools (`<|python_tag|>brave_search.call(...)`, Python code) is text.
"""

from __future__ import annotations

from weft.front.tools.form import Form
from weft.front.tools.machine import Machine, Reading


class Llama3(Machine):
    name = "llama3_json"
    form = Form(call='{"name": "NAME", "parameters": ARGUMENTS}', between="; ", several=False)
    markers = ("<|python_tag|>",)
    openings = "{"
    special = markers

    def calls(self, marker: str) -> Reading[None]:
        char = marker if marker in self.openings else (yield from self.solid())
        if char != "{":
            self.fail(char)
        yield from self.object()
        while (yield from self.separated(";", "{")):
            yield from self.object()
