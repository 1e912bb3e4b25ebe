"""A comparison as one page: charts over the load, charts over time at the highest one, and the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from weft import __version__
from weft.sim.charts import HUES, Points, lines, number, stacks
from weft.sim.run import Point, Wanted
from weft.slots.cost import PARTS

STYLE = """
:root{--bg:#fbfaf7;--ink:#22252a;--dim:#6b7077;--rule:#dedad0;--card:#fff;
--s0:#1f6fb4;--s1:#d1602c;--s2:#2f8f5b;--s3:#8a4fb0;--s4:#b4902a;--s5:#c2417c;--s6:#3a9aa6;--s7:#6a6f78}
@media (prefers-color-scheme:dark){:root{--bg:#16181c;--ink:#e6e4de;--dim:#9a9fa7;--rule:#33373e;--card:#1d2025;
--s0:#5aa9ea;--s1:#f08a58;--s2:#5cc08a;--s3:#b98be0;--s4:#dcb64c;--s5:#ec79ab;--s6:#63c4d0;--s7:#a2a8b2}}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",Helvetica,Arial,sans-serif}
main{max-width:1240px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:18px;margin:34px 0 4px}p{margin:4px 0;max-width:72ch}.dim{color:var(--dim)}
.legend{display:flex;flex-wrap:wrap;gap:4px 20px;margin:12px 0}.legend span{display:flex;align-items:center;gap:7px}
.legend i{width:14px;height:14px;border-radius:3px;display:inline-block}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(400px,100%),1fr));gap:14px;margin-top:10px}
.three{grid-template-columns:repeat(auto-fit,minmax(min(290px,100%),1fr))}.bars{max-width:660px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 10px 6px}
figcaption{font-weight:600;font-size:14px;padding:0 6px 4px}figcaption small{font-weight:400;color:var(--dim)}
svg{width:100%;height:auto;display:block}svg text{font:11px system-ui,"Segoe UI",Helvetica,Arial,sans-serif;fill:var(--dim)}
.three svg text{font-size:13px}
svg .label{fill:var(--ink)}svg .inside{fill:var(--bg)}svg .grid{stroke:var(--rule);stroke-width:1}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round}svg .limit{stroke:var(--ink);stroke-dasharray:5 4;stroke-width:1}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px;margin-top:8px}
th,td{padding:4px 10px;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{font-weight:600}td.best{font-weight:700}
"""
Value = Callable[[Point], float]


def page(points: Sequence[Point], wanted: Wanted) -> str:
    """The page as HTML that needs nothing beside itself."""
    names = list(dict.fromkeys(p.policy for p in points))
    most = max(p.rate for p in points)
    last = [p for p in points if p.rate == most]
    out = [
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(' and '.join(names))}: a simulation</title><style>{STYLE}</style></head><body><main>",
        f"<h1>{escape(_listed(names))}</h1>", f'<p class="dim">{escape(_what(points, wanted))}</p>',
        _legend(names),
        "<h2>Over the load</h2>", _grid(_over_load(points, names)),
        "<h2>Latency over the load</h2>", _grid(_latencies(points, names, wanted), " three"),
        f"<h2>Over time, at {number(last[0].offered)} requests a second</h2>",
        _grid(_over_time(last, names)),
        "<h2>What bounds the steps</h2>",
        '<p class="dim">Share of the time that steps spend on each part of their cost.</p>', _legend(list(PARTS)),
        f'<div class="bars">{_figure("Shares of step time", "", stacks(_bounds(points), across="share of step time"))}</div>',
        "<h2>Numbers</h2>", _table(points),
        f'<p class="dim">weft {escape(__version__)}, weft sim; the schedulers are those that serve.</p>', "</main></body></html>",
    ]  # fmt: skip
    return "\n".join(out) + "\n"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _what(points: Sequence[Point], w: Wanted) -> str:
    slo = [f"first token within {1e3 * w.slo.ttft_s:,.0f} ms"] if w.slo.ttft_s is not None else []
    slo += [f"{1e3 * w.slo.tpot_s:,.0f} ms a token"] if w.slo.tpot_s is not None else []
    slo += [f"no gap above {1e3 * w.slo.gap_s:,.0f} ms"] if w.slo.gap_s is not None else []
    good = (
        f" A good request: {' and '.join(slo)}."
        if slo
        else " Every request that finishes is good (no SLO was asked for)."
    )
    devices = f"{w.replicas} x " if w.replicas > 1 else ""
    each = f"{w.devices} {w.hardware}" if w.devices > 1 else w.hardware
    own = ", but where a policy brings its cost" if any("cost=" in p.policy for p in points) else ""
    return (
        f"{w.model} on {devices}{each}, the load of {w.trace.rpartition('/')[2]} ({points[0].result['requests']:,} requests), "
        f"{w.max_num_seqs} sequences and {w.max_rows:,} rows a step, steps priced by {w.cost}{own}, seed {w.seed}.{good}"
    )


def _legend(names: Sequence[str]) -> str:
    each = "".join(
        f'<span><i style="background:var({HUES[i % len(HUES)]})"></i>{escape(n)}</span>' for i, n in enumerate(names)
    )
    return f'<div class="legend">{each}</div>'


def _figure(title: str, small: str, svg: str) -> str:
    note = f" <small>{escape(small)}</small>" if small else ""
    return f"<figure><figcaption>{escape(title)}{note}</figcaption>{svg}</figure>"


def _grid(figures: Sequence[str], kind: str = "") -> str:
    return f'<div class="grid{kind}">{"".join(figures)}</div>'


def _series(points: Sequence[Point], names: Sequence[str], value: Value) -> dict[str, Points]:
    return {n: [(p.offered, value(p)) for p in points if p.policy == n] for n in names}


ACROSS = "requests a second, offered"


def _over_load(points: Sequence[Point], names: Sequence[str]) -> list[str]:
    charts: list[tuple[str, str, Value, str, float]] = [
        ("Goodput", "requests a second that keep all limits", lambda p: p.result["goodput"], "1/s", 0.0),
        ("SLO attainment", "share of all requests", lambda p: 100 * p.result["slo_met"], "%", 100.0),
        ("Tokens out", "of all answers", lambda p: p.result["output_tok_s"], "tokens/s", 0.0),
        ("Fairness", "Jain's index of what tenants, or requests, get", lambda p: p.result["fairness"], "index", 1.0),
        ("Utilization", "share of the time in which devices compute", lambda p: 100 * p.result["utilization"], "%", 100.0),
        ("Memory", "largest share of the KV pool that is held",
         lambda p: 100 * max((v for _, v in p.curves["memory"]), default=0.0), "%", 100.0),
    ]  # fmt: skip
    return [
        _figure(title, small, lines(_series(points, names, value), across=ACROSS, up=up, least=least))
        for title, small, value, up, least in charts
    ]


def _latencies(points: Sequence[Point], names: Sequence[str], wanted: Wanted) -> list[str]:
    def latency(key: str, q: str) -> Value:
        return lambda p: float(p.result[key][q])

    found = []
    for title, key, limit in (
        ("Time to first token", "ttft_s", wanted.slo.ttft_s), ("Time per token", "tpot_s", wanted.slo.tpot_s),
        ("Gap between tokens", "gap_s", wanted.slo.gap_s),
    ):  # fmt: skip
        for q in ("p50", "p90", "p99"):
            series = _series(points, names, latency(key, q))
            found.append(
                _figure(f"{title}, {q}", "", lines(series, across=ACROSS, up="seconds", log=True, limit=limit))
            )
    return found


def _over_time(last: Sequence[Point], names: Sequence[str]) -> list[str]:
    def series(key: str, scale: float = 1.0) -> dict[str, Points]:
        return {p.policy: [(t, scale * v) for t, v in p.curves[key]] for n in names for p in last if p.policy == n}

    charts = [
        ("Sequences that run", "running", 1.0, "sequences", 0.0),
        ("Rows computed", "tokens", 1.0, "rows/s", 0.0),
        ("Devices busy", "busy", 100.0, "%", 100.0),
        ("KV pool held", "memory", 100.0, "%", 100.0),
    ]
    return [
        _figure(title, "", lines(series(key, scale), across="seconds", up=up, markers=False, least=least))
        for title, key, scale, up, least in charts
    ]


def _bounds(points: Sequence[Point]) -> dict[str, dict[str, float]]:
    return {f"{p.policy}, {number(p.offered)}/s": p.result["bound_by"] for p in points}


COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], float], str, int], ...] = (
    ("goodput /s", lambda r: r["goodput"], "{:.3f}", 1),
    ("SLO met", lambda r: 100 * r["slo_met"], "{:.1f} %", 1),
    ("TTFT p50", lambda r: 1e3 * r["ttft_s"]["p50"], "{:,.0f} ms", -1),
    ("TTFT p99", lambda r: 1e3 * r["ttft_s"]["p99"], "{:,.0f} ms", -1),
    ("TPOT p50", lambda r: 1e3 * r["tpot_s"]["p50"], "{:,.1f} ms", -1),
    ("TPOT p99", lambda r: 1e3 * r["tpot_s"]["p99"], "{:,.1f} ms", -1),
    ("tokens/s", lambda r: r["output_tok_s"], "{:,.0f}", 1),
    ("fairness", lambda r: r["fairness"], "{:.3f}", 1),
    ("busy", lambda r: 100 * r["utilization"], "{:.1f} %", 0),
    ("preemptions", lambda r: r["preemptions"], "{:,.0f}", -1),
    ("from cache", lambda r: r["cached_tokens"], "{:,.0f}", 1),
    ("refused", lambda r: r["refused"], "{:,.0f}", -1),
)
"""Head, value, form, and which way is better: 1 more, -1 less, 0 neither."""


def _table(points: Sequence[Point]) -> str:
    out = [
        '<div class="wide"><table><tr><th>policy</th><th>offered /s</th>',
        *(f"<th>{c[0]}</th>" for c in COLUMNS),
        "</tr>",
    ]
    for p in points:
        beside = [q for q in points if q.rate == p.rate]
        out.append(f"<tr><td>{escape(p.policy)}</td><td>{p.offered:.3g}</td>")
        for _, value, form, better in COLUMNS:
            all_ = [value(q.result) for q in beside]
            best = better and len(set(all_)) > 1 and value(p.result) == (max(all_) if better > 0 else min(all_))
            out.append(f"<td{' class=best' if best else ''}>{form.format(value(p.result))}</td>")
        out.append("</tr>")
    return "".join([*out, "</table></div>"])
