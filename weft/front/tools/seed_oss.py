"""Seed-OSS: the form of Qwen3-Coder between `<seed:tool_call>` and `</seed:tool_call>`.  Source: the model's template."""

from __future__ import annotations

from weft.front.tools.form import Form
from weft.front.tools.qwen3_coder import Qwen3Coder


class SeedOSS(Qwen3Coder):
    name = "seed_oss"
    form = Form(
        call='<seed:tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</seed:tool_call>', tag="seed:tool_call"
    )
    markers = ("<seed:tool_call>", "<function=")
    special = ("<seed:tool_call>", "</seed:tool_call>")
