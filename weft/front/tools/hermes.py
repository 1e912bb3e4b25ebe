"""Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, once for each call.

Source: the templates of Hermes 2 Pro and 3, Qwen 2.5 and 3.  The closing tag may be missing, as models forget it.
"""

from __future__ import annotations

from weft.front.tools.form import Form
from weft.front.tools.machine import Machine, Reading


class Hermes(Machine):
    name = "hermes"
    form = Form(call='<tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call>')
    markers = ("<tool_call>",)
    special = ("<tool_call>", "</tool_call>")

    def calls(self, marker: str) -> Reading[None]:
        char = yield from self.solid()
        if char != "{":
            self.fail(char)
        yield from self.object()
        yield from self.optional("</tool_call>")
