"""How fast the simulator is: an hour of a real trace on one engine, and many engines behind routers.

python -m bench.sim.speed ../shared/data/traces/azure2023/AzureLLMInferenceTrace_conv.csv --out bench/results/sim-speed.json
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

from weft.sim.kinds import cluster_of
from weft.sim.run import Wanted, load, setting
from weft.sim.workload import Pace

ROUTERS = ("round_robin", "least_loaded", "power_of_two", "prefix_aware")


def timed(title: str, wanted: Wanted) -> dict[str, Any]:
    """One simulation: processor seconds of one core, and tokens for each of them."""
    began = time.process_time()
    cluster = cluster_of(setting(wanted))
    meter = cluster.run(load(wanted))
    took = time.process_time() - began
    result = cluster.result()
    prompts, outputs = sum(meter.prompts), sum(meter.outputs)
    return {
        "case": title, "policy": wanted.policy, "replicas": wanted.replicas, "requests": result["requests"],
        "finished": result["finished"], "prompt_tokens": prompts, "output_tokens": outputs, "steps": result["steps"],
        "coasted": sum(r._coast.steps for r in cluster.replicas), "simulated_s": result["duration_s"], "seconds": took,
        "output_tok_per_s": outputs / took, "prompt_tok_per_s": prompts / took,
        "rss_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--replicas", type=int, default=100)
    given = parser.parse_args()
    cases = [timed("the whole trace, one engine", Wanted(trace=given.trace))]
    for router in ROUTERS:
        pace = Pace(time=float(given.replicas), requests=20_000)
        cases.append(
            timed("many engines", Wanted(trace=given.trace, policy=router, replicas=given.replicas, pace=pace))
        )
    text = json.dumps(
        {"benchmark": "simulator speed", "hardware": "h100", "model": "llama-3.1-8b", "cases": cases}, indent=1
    )
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
