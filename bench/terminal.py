"""A benchmark on a terminal: what it is doing, and its result in lines."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from weft.exec.host import format_size


def table(result: Mapping[str, Any]) -> str:
    """The result for a terminal: a line for each case."""
    lines = []
    for c in result["comparisons"]:
        load = c["load"]
        lines.append(
            f"{c['model']}, {c['title']}: batch {load['batch']}, {load['prompt_tok']} + {load['new_tok']} tokens, "
            f"{c['dtype']}, {c['threads']} threads, {c['rounds']} rounds, limit {c['limit']['decode_tok_s']:.0f} tok/s"
        )
        for case in c["cases"]:
            mid, ratio, spread = case["median"], case["ratio"], case["ratio_spread"]["decode_tok_s"]
            parts = [
                f"  {case['name']:<24} decode {mid['decode_tok_s']:8.1f} tok/s",
                f"x {ratio['decode_tok_s']:.2f} ({spread[0]:.2f} to {spread[1]:.2f})",
                f"{mid['tok_per_step']:.2f} tok a step of {1000 * mid['step_s']:.1f} ms",
                *([f"prefill x {ratio['prefill_tok_s']:.2f}"] if "prefill_tok_s" in ratio else []),
                f"KV {format_size(int(mid['kv_peak_bytes']))}",
                f"same tokens {case['same_tokens']:.0%}",
                ", ".join(f"{act.rpartition('.')[2]} {count:g}" for act, count in case["acts"].items()),
            ]
            lines.append("  ".join(p for p in parts if p))
    return "\n".join(lines)


def line(text: str) -> None:
    print(f"\r{text:<100}", end="", file=sys.stderr, flush=True)
