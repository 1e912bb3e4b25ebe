"""Seed-OSS: the form of Qwen3-Coder between `<seed:tool_call>` and `</seed:tool_call>`.  Source: the model's template."""

from __future__ import annotations

from weft.front.tools.qwen3_coder import Qwen3Coder


class SeedOSS(Qwen3Coder):
    name = "seed_oss"
    opening = "<seed:tool_call>"
    closing = "</seed:tool_call>"
    markers = ("<seed:tool_call>", "<function=")
