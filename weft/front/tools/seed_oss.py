"""Seed-OSS: the form of Qwen3-Coder between `<seed:tool_call>` and `</seed:tool_call>`.  Source: the model's template."""

from __future__ import annotations

from collections.abc import Sequence

from weft.front.tools.machine import Call
from weft.front.tools.qwen3_coder import Qwen3Coder, written


class SeedOSS(Qwen3Coder):
    name = "seed_oss"
    opening = "<seed:tool_call>"
    closing = "</seed:tool_call>"
    markers = ("<seed:tool_call>", "<function=")
    special = ("<seed:tool_call>", "</seed:tool_call>")

    @staticmethod
    def written(calls: Sequence[Call]) -> str:
        return written(calls, "seed:tool_call")
