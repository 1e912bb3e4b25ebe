"""Every policy beside first come, first served and the clairvoyant bound, on the load of its claim at three paces.

    python -m bench.sim.charts ../shared/data/traces
    python -m tools.pages                                      (draws docs/techniques/charts from what this keeps)

A policy has the arguments with which its claim was judged.  bench/results/sim-charts.json keeps a few figures for each policy and
each pace.  The bound is of the mean time to the end, for who fills steps as it does; of other figures it is none.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.sim.policies import OUT as JUDGED
from bench.sim.policies import Case, cases, claimed, simulated, stacked, value
from weft.registry import lookup, names
from weft.sim.run import Wanted, priced
from weft.sim.workload import Arrival

OUT = Path(__file__).resolve().parents[1] / "results" / "sim-charts.json"
PACES = (0.5, 1.0, 1.5)
"""Of the load's own pace; where all requests come at once, of their number."""
KEPT = ("goodput", "ttft_s.p99", "gap_s.p99", "e2e_s.mean")
DIGITS = 4


def beside(slot: str, name: str, case: Case, judged: dict[str, Any]) -> dict[str, Wanted]:
    """By what the chart calls them: first come, first served, the policy, and the bound."""
    given = case.wanted
    route = "+least_loaded" if given.replicas > 1 else ""
    plain = "+round_robin" if name == "least_loaded" else route  # it would be beside itself
    words = str(judged.get("arguments") or name).removeprefix("fcfs+")
    if slot == "schedule":
        words = stacked(name) if words == name else words
    elif slot == "cost":
        words = f"fcfs+cost={words}"
    shown = {"fcfs" + plain: f"fcfs{plain}", name: words, "clairvoyant" + route: f"clairvoyant{route}"}
    return {label: priced(replace(given, cost="roofline"), policy) for label, policy in shown.items()}


def few(case: Case, share: float) -> Case:
    """The load at this pace; where everybody comes at once, so many of them."""
    load = list(case.load())
    if load[-1].time_s > 0:
        return case
    part: Iterable[Arrival] = load[: max(1, round(len(load) * share / max(PACES)))]
    return replace(case, load=lambda: part)


def point(case: Case, wanted: Wanted, pace: float, metric: str) -> dict[str, float]:
    """What the chart says of one run."""
    small = few(case, pace)
    result = simulated(small, wanted, pace)
    at = result["offered"] or float(result["requests"])
    found = {"at": at}
    for key in dict.fromkeys((metric, *KEPT)):
        try:
            found[key] = value(result, key)
        except KeyError:
            continue  # only some costs and loads say it
    return {k: _short(v) for k, v in found.items()}


def _short(x: float) -> float:
    return float(f"{x:.{DIGITS}g}") if math.isfinite(x) else 0.0


def chart(
    slot: str, name: str, known: dict[str, Case], done: dict[tuple[str, str, float], dict[str, float]]
) -> dict[str, Any]:
    """A policy's record.  done: runs of what others are compared with, by load, words and pace."""
    claim = getattr(lookup(slot, name), "claim", None)
    where = claim.case if claim is not None else "replicas" if slot == "route" else "overload"
    metric = claim.metric if claim is not None and claim.metric != "capacity" else "goodput"
    case, series = known[where], dict[str, list[dict[str, float]]]()
    judged = json.loads(JUDGED.read_text(encoding="utf8")).get(f"{slot}={name}", {})
    for label, wanted in beside(slot, name, case, judged).items():
        points = []
        for pace in PACES:
            key = (where + metric, f"{wanted.policy} {wanted.cost}", pace)
            if key not in done:
                done[key] = point(case, wanted, pace, metric)
            points.append(done[key])
        series[label] = points
    at_once = list(case.load())[-1].time_s == 0
    limits = {k: getattr(case.wanted.slo, k) for k in ("ttft_s", "tpot_s", "gap_s")}
    return {"load": case.title, "metric": metric, "across": "requests, all at once" if at_once else "requests a second, offered",
            "limits": {k: v for k, v in limits.items() if v is not None}, "series": series}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="policies, with commas between them; the others stay as they are")
    parser.add_argument("--resume", action="store_true", help="those that are kept already stay as they are")
    given = parser.parse_args()
    known, done = cases(given.folder), dict[tuple[str, str, float], dict[str, float]]()
    kept: dict[str, Any] = json.loads(OUT.read_text(encoding="utf8")) if OUT.is_file() else {}
    for slot in ("schedule", "route", "place", "cost"):
        for name in names(slot):
            full = f"{slot}={name}"
            if (given.only and name not in given.only.split(",")) or (slot == "cost" and not claimed(name)):
                continue
            if given.resume and full in kept:
                continue
            kept[full] = chart(slot, name, known, done)
            OUT.write_text(
                json.dumps(kept, indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf8"
            )
            print(full, flush=True)


if __name__ == "__main__":
    main()
