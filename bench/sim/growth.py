"""What a simulated request costs as requests grow more: every schedule, router, placement and cost, all at once and as a stream.

    python -m bench.sim.growth --out bench/results/sim-growth.json

Processor time of one core for each request.  Where nothing but queues and heaps grows it goes with the logarithm of the number.
`exponent` is the slope of the whole run's time between the smallest number and the largest: 1.0 is proportional, and n log n
is 1.12 between 2,000 and 20,000.  Those who come at once and are few do not fill the engines, and caches hold what they need: a
slope a little above that says nothing yet.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weft.registry import lookup, names
from weft.sim.kinds import cluster_of
from weft.sim.run import Wanted, load, setting

OUT = Path(__file__).resolve().parents[1] / "results" / "sim-growth.json"
SIZES = (2000, 8000, 20000)
LOADS = {"at once": 1e7, "stream": 60.0}
"""Requests a second, for each engine: all of them wait, or one is served as it comes."""
WORST = 1.2
"""An exponent above that is told at the end."""
ENGINES = 8
DEVICES = 4
GIVEN = {
    "cost=megatron": "stages=2", "cost=energonai": "stages=2", "place=epd": "encode=2",
    "schedule=deadline": "ttft_s=100000.0",  # refuses nobody, so that everybody waits
}  # fmt: skip
APART = ("calibrated", "table")
"""Costs that read a file."""


def cases() -> dict[str, dict[str, Any]]:
    """By name in full: what is asked for beside the load."""
    found: dict[str, dict[str, Any]] = {}
    for slot in ("schedule", "route", "place", "cost"):
        for name in names(slot):
            if slot == "cost" and name in APART:
                continue
            full = f"{slot}={name}"
            text = f"{name}({GIVEN[full]})" if full in GIVEN else name
            if slot == "cost":
                found[full] = {"cost": text, "devices": DEVICES}
                continue
            beside = "".join(f"+{part}" for part in getattr(lookup(slot, name), "beside", ()))
            found[full] = {"policy": text + beside, "replicas": 1 if slot == "schedule" else ENGINES}
    return found


def seconds(given: dict[str, Any], rate: float, requests: int) -> float:
    """Processor time of one simulation: short prompts that share beginnings, of tenants that grow more as requests do."""
    rate *= given.get("replicas", 1)
    images = ", images=2" if "epd" in given.get("policy", "") else ""
    trace = (
        f"poisson(rate={rate}, requests={requests}, prompt=60, output=10, tenants={max(4, requests // 40)}, shared=64, "
        f"urgent=0.05{images})"
    )
    wanted = Wanted(trace=trace, max_model_len=8192, seed=1, **given)
    gc.collect()
    began = time.process_time()
    cluster = cluster_of(setting(wanted))
    cluster.run(load(wanted))
    result = cluster.result()
    took = time.process_time() - began
    assert result["finished"] + result["refused"] == requests
    return took


def measured(given: dict[str, Any], rate: float, sizes: Sequence[int]) -> dict[str, Any]:
    each = [seconds(given, rate, n) for n in sizes]
    slope = math.log(each[-1] / each[0]) / math.log(sizes[-1] / sizes[0])
    return {
        "us_per_request": [round(1e6 * t / n, 1) for t, n in zip(each, sizes, strict=True)],
        "exponent": round(slope, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--only", help="as in schedule=fair,route or cost; the others stay as they are")
    given = parser.parse_args()
    sizes = [int(n) for n in given.sizes.split(",")]
    rows: dict[str, Any] = json.loads(given.out.read_text(encoding="utf8"))["cases"] if given.out.is_file() else {}
    for full, asked in cases().items():
        if given.only and not any(full == word or full.partition("=")[0] == word for word in given.only.split(",")):
            continue
        rows[full] = {"requests": sizes, **{name: measured(asked, rate, sizes) for name, rate in LOADS.items()}}
        text = {"benchmark": "simulator growth", "engines": ENGINES, "cases": rows}
        given.out.write_text(json.dumps(text).replace('}}, "', '}},\n"') + "\n", encoding="utf8")
        told = (f"{name} {rows[full][name]['us_per_request']} {rows[full][name]['exponent']}" for name in LOADS)
        print(full, *told, flush=True)
    worst = [f"{full}, {name}" for full, row in rows.items() for name in LOADS if row[name]["exponent"] > WORST]
    print("worse than n log n: " + ("; ".join(worst) or "none"))


if __name__ == "__main__":
    main()
