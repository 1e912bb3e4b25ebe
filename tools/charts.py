"""Charts of policies for their pages: from the figures that `python -m bench.sim.charts` keeps to one SVG each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from weft.sim import charts
from weft.sim.charts import HEIGHT, HUES, WIDTH

KEPT = "sim-charts.json"
TITLES: Mapping[str, tuple[str, str]] = {
    "goodput": ("Requests within their limits", "1/s"),
    "ttft_s.p99": ("Time to first token, p99", "seconds"),
    "ttft_s.p50": ("Time to first token, median", "seconds"),
    "ttft_s.mean": ("Time to first token, mean", "seconds"),
    "gap_s.p99": ("Gap between tokens, p99", "seconds"),
    "e2e_s.mean": ("Time to the end, mean (the bound's own)", "seconds"),
    "output_tok_s": ("Tokens out", "tokens/s"),
    "slo_met": ("Share of requests within their limits", "share"),
    "cached_tokens": ("Prompt tokens from the cache", "tokens"),
    "light_ttft_s.p99": ("First token of the light tenant, p99", "seconds"),
    "urgent_ttft_s.p99": ("First token of urgent requests, p99", "seconds"),
    "tok_per_usd": ("Tokens for a dollar of rent", "tokens"),
    "trained_share": ("Training beside it, share of the device", "share"),
}
"""By figure: the head of its chart and what its axis says."""
SHOWN = ("goodput", "ttft_s.p99", "gap_s.p99", "e2e_s.mean")
LIMITED = {"ttft_s.p99": "ttft_s", "gap_s.p99": "gap_s"}
PAD, HEAD = 10, 62
STYLE = """:root{--bg:#fbfaf7;--ink:#22252a;--dim:#6b7077;--rule:#dedad0;--s0:#1f6fb4;--s1:#d1602c;--s2:#2f8f5b}
@media (prefers-color-scheme:dark){:root{--bg:#16181c;--ink:#e6e4de;--dim:#9a9fa7;--rule:#33373e;
--s0:#5aa9ea;--s1:#f08a58;--s2:#5cc08a}}
text{font:11px system-ui,"Segoe UI",Helvetica,Arial,sans-serif;fill:var(--dim)}.label,.head{fill:var(--ink)}.head{font-weight:600}
.grid{stroke:var(--rule)}.line{fill:none;stroke-width:2}.limit{stroke:var(--ink);stroke-dasharray:5 4}"""


def drawn(results: Path) -> dict[str, str]:
    """Every chart by its file name; none where no figures are kept."""
    file = results / KEPT
    kept = json.loads(file.read_text(encoding="utf8")) if file.is_file() else {}
    return {f"{name.replace('=', '-')}.svg": svg(name, record) for name, record in kept.items()}


def svg(name: str, record: Mapping[str, Any]) -> str:
    """Four charts over the load, with what their lines are above them."""
    shown = list(dict.fromkeys((record["metric"], *SHOWN)))[:4]
    if "e2e_s.mean" not in shown:  # of which there is a bound
        shown[-1] = "e2e_s.mean"
    width, height = 2 * WIDTH + 3 * PAD, HEAD + 2 * (HEIGHT + 24) + PAD
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(name)} beside first come, first served and a clairvoyant bound"><style>{STYLE}</style>',
        f'<rect width="{width}" height="{height}" style="fill:var(--bg)"/>',
        f'<text class="head" x="{PAD + 6}" y="24">{escape(record["load"])}</text>',
    ]
    x = PAD + 6.0
    for i, label in enumerate(record["series"]):
        out.append(f'<rect x="{x:.0f}" y="36" width="12" height="12" rx="3" style="fill:var({HUES[i]})"/>')
        out.append(f'<text class="label" x="{x + 17:.0f}" y="46">{escape(label)}</text>')
        x += 40 + 6.6 * len(label)
    for k, key in enumerate(shown):
        title, up = TITLES[key]
        left, top = PAD + (k % 2) * (WIDTH + PAD), HEAD + (k // 2) * (HEIGHT + 24)
        series = {label: [(p["at"], p[key]) for p in points if key in p] for label, points in record["series"].items()}
        limit = record["limits"].get(LIMITED.get(key, ""))
        chart = charts.lines(series, across=record["across"], up=up, log=up == "seconds", limit=limit)
        out.append(f'<text class="head" x="{left + 6}" y="{top + 14}">{escape(title)}</text>')
        out.append(chart.replace("<svg ", f'<svg x="{left}" y="{top + 20}" width="{WIDTH}" height="{HEIGHT}" ', 1))
    return "".join(out) + "</svg>\n"
