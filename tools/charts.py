"""Charts of policies for their pages, from the figures that `python -m bench.sim.charts` keeps to one SVG each; and of peaks.

python -m tools.charts        # writes docs/images/peak.svg; charts of policies are written with their pages, by tools.pages
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from weft.sim import charts
from weft.sim.charts import HEIGHT, HUES, WIDTH
from weft.sim.machines import hardware, model
from weft.sim.peak import peak
from weft.sim.run import Wanted, run, setting

KEPT = "sim-charts.json"
PEAKS = Path(__file__).resolve().parents[1] / "docs" / "images" / "peak.svg"
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
    each = []
    for key in shown:
        title, up = TITLES[key]
        series = {label: [(p["at"], p[key]) for p in points if key in p] for label, points in record["series"].items()}
        limit = record["limits"].get(LIMITED.get(key, ""))
        each.append((title, charts.lines(series, across=record["across"], up=up, log=up == "seconds", limit=limit)))
    label = f"{name} beside first come, first served and a clairvoyant bound"
    return sheet(label, record["load"], list(record["series"]), each)


def sheet(label: str, title: str, names: Sequence[str], each: Sequence[tuple[str, str]]) -> str:
    """Four charts under their heads, two in a row, with what their lines are above them."""
    width, height = 2 * WIDTH + 3 * PAD, HEAD + 2 * (HEIGHT + 24) + PAD
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}"><style>{STYLE}</style>',
        f'<rect width="{width}" height="{height}" style="fill:var(--bg)"/>',
        f'<text class="head" x="{PAD + 6}" y="24">{escape(title)}</text>',
    ]
    x = PAD + 6.0
    for i, name in enumerate(names):
        out.append(f'<rect x="{x:.0f}" y="36" width="12" height="12" rx="3" style="fill:var({HUES[i]})"/>')
        out.append(f'<text class="label" x="{x + 17:.0f}" y="46">{escape(name)}</text>')
        x += 40 + 6.6 * len(name)
    for k, (head, chart) in enumerate(each):
        left, top = PAD + (k % 2) * (WIDTH + PAD), HEAD + (k // 2) * (HEIGHT + 24)
        out.append(f'<text class="head" x="{left + 6}" y="{top + 14}">{escape(head)}</text>')
        out.append(chart.replace("<svg ", f'<svg x="{left}" y="{top + 20}" width="{WIDTH}" height="{HEIGHT}" ', 1))
    return "".join(out) + "</svg>\n"


# ---------------------------------------------------------------------------------------------- peaks


DEVICE, MODEL = "h100", "llama-3.1-8b"
CONTEXTS = (4000, 16_000, 32_000, 64_000, 96_000, 128_000)
LIMITS = ("users", "prefill_s", "decode_s", "switch_s")
HEADS = {
    "users": ("Contexts that memory holds", "contexts"),
    "prefill_s": ("Computing the context", "seconds"),
    "decode_s": ("A token of an answer alone", "seconds"),
    "switch_s": ("Out of the memory and back", "seconds"),
}


def peaks() -> str:
    """The calculator's four limits by the length of the context, and what comes of them first come, first served."""
    figures = model(MODEL).figures
    limits = {
        "limit": [peak(hardware(DEVICE), figures, n) for n in CONTEXTS],
        "limit with a quarter of KV": [peak(hardware(DEVICE), figures, n, {"tokens": 0.25}) for n in CONTEXTS],
    }
    served = {n: alone(n) for n in CONTEXTS}
    each = []
    for key in LIMITS:
        title, up = HEADS[key]
        series = {"fcfs, simulated": [(float(n), told[key]) for n, told in served.items() if key in told]}
        series |= {name: [(float(p.context), float(getattr(p, key))) for p in found] for name, found in limits.items()}
        each.append((title, charts.lines(series, across="tokens of the context", up=up, log=True)))
    title = f"{MODEL} on one {DEVICE}, one context at a time: what it could do at best, and what the simulator says"
    return sheet("Limits at a device's peaks by the length of the context", title, ["fcfs, simulated", *limits], each)


def alone(context: int) -> dict[str, float]:
    """One request of so many tokens on an engine that has nothing else to do, in any order of requests."""
    load = f"poisson(rate=1, requests=1, prompt={context}, output=101, spread=0.0)"
    wanted = Wanted(trace=load, hardware=DEVICE, model=MODEL)
    result, _ = run(wanted)
    held = setting(wanted).kv_blocks() * wanted.block_tokens
    return {"users": held // context, "prefill_s": result["ttft_s"]["mean"], "decode_s": result["tpot_s"]["mean"]}


def main() -> None:
    PEAKS.write_text(peaks(), encoding="utf8")
    print(PEAKS)


if __name__ == "__main__":
    main()
