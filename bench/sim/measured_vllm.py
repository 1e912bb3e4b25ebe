"""The simulator against an engine that nobody here wrote: vLLM as LLMServingSim measured it.

    python -m bench.sim.measured_vllm ../shared/data/traces/llmservingsim-measured-vllm --out bench/results/sim-measured-vllm.json

For each run the same arrivals, lengths and limits; two efficiencies (of arithmetic and of memory) are fitted to the latencies of
the first third of its requests, and the errors are those of the rest, which the fit has not seen.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weft.cost.roofline import Roofline
from weft.sim.cluster import Cluster
from weft.sim.metrics import quantile
from weft.sim.run import Wanted, setting
from weft.sim.workload import UNIQUE, Arrival

DEVICES = {"RTX4090": "rtx4090", "RTXPRO6000": "rtxpro6000"}
MODELS = {"Llama-3.1-8B": "llama-3.1-8b", "Qwen3-32B": "qwen3-32b", "Qwen3-30B-A3B-Instruct-2507": "qwen3-30b-a3b"}
USABLE = 0.9
"""vLLM's gpu_memory_utilization, its default."""


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run.  rows: (time of arrival, prompt, output, time of the first token, of the last one), in seconds from 0."""

    name: str
    wanted: Wanted
    rows: list[tuple[float, int, int, float, float]]

    @property
    def load(self) -> list[Arrival]:
        return [Arrival(at, ((UNIQUE + i, prompt),), output) for i, (at, prompt, output, _, _) in enumerate(self.rows)]


def read(folder: Path) -> Run:
    meta = json.loads((folder / "meta.json").read_text())
    found = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines() if line.strip()]
    # Arrivals are told by the wall clock, tokens by the engine's; the nearest request tells how far they are apart.
    apart = min(r["queued_ts"] - r["arrival_time"] for r in found)
    zero = min(r["arrival_time"] for r in found) + apart
    rows = sorted(
        (
            r["arrival_time"] + apart - zero,
            r["input_toks"],
            r["output_toks"],
            r["first_token_ts"] - zero,
            r["last_token_ts"] - zero,
        )
        for r in found
    )
    engine, cache = meta["engine_kwargs"], meta.get("kv_cache") or {}
    # Ranks that share a mixture's experts go step by step together: as one engine with the limits of all of them.
    ranks = engine["data_parallel_size"]
    wanted = Wanted(
        trace=folder.name, hardware=DEVICES[folder.parent.name], model=MODELS[folder.name],
        devices=engine["tensor_parallel_size"] * ranks, max_num_seqs=engine["max_num_seqs"] * ranks,
        max_rows=engine["max_num_batched_tokens"] * ranks, blocks=cache.get("num_gpu_blocks"),
        max_model_len=engine["max_model_len"],
    )  # fmt: skip
    return Run(f"{folder.parent.name} {folder.name}", wanted, rows)


def simulated(run: Run, compute: float, memory: float) -> list[tuple[float, float]]:
    """(first token, last token) of each request."""
    made = replace(setting(run.wanted), cost=Roofline(compute=compute, memory=memory, attention=compute))
    if made.blocks is None:
        made = replace(made, blocks=made.model.blocks(made.hardware, USABLE))
    meter = Cluster(made).run(run.load)
    return list(zip(meter.first, meter.ended, strict=True))


def figures(run: Run, tokens: list[tuple[float, float]], of: range) -> dict[str, float]:
    """Latencies of some of the requests, and when the last of them ended."""
    ttft = sorted(tokens[i][0] - run.rows[i][0] for i in of)
    tpot = sorted((tokens[i][1] - tokens[i][0]) / (run.rows[i][2] - 1) for i in of if run.rows[i][2] > 1)
    out = {"duration_s": max(tokens[i][1] for i in of)}
    for name, values in (("ttft_s", ttft), ("tpot_s", tpot)):
        out |= {
            f"{name} mean": statistics.fmean(values),
            f"{name} p50": quantile(values, 0.5),
            f"{name} p99": quantile(values, 0.99),
        }
    return out


def distance(run: Run, compute: float, memory: float, of: range) -> float:
    """Sum of squared logarithms of the ratios of mean and median latencies."""
    told = figures(run, simulated(run, compute, memory), of)
    real = figures(run, [(r[3], r[4]) for r in run.rows], of)
    keys = ("ttft_s mean", "ttft_s p50", "tpot_s mean", "tpot_s p50")
    return sum(math.log(max(told[k], 1e-9) / max(real[k], 1e-9)) ** 2 for k in keys)


def fit(run: Run) -> tuple[float, float]:
    """The two efficiencies, on a grid that grows finer around the best point."""
    third = range(len(run.rows) // 3)
    best, at = math.inf, (0.5, 0.7)
    seen: dict[tuple[float, float], float] = {}
    for step in (1.4, 1.18, 1.08, 1.03):
        centre = at
        for i in (-2, -1, 0, 1) if step == 1.4 else (-1, 0, 1):
            for j in (-1, 0, 1):
                point = (round(min(1.0, centre[0] * step**i), 4), round(min(1.0, centre[1] * step**j), 4))
                if point not in seen:
                    seen[point] = distance(run, *point, third)
                if seen[point] < best:
                    best, at = seen[point], point
    return at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    cases: list[dict[str, Any]] = []
    for meta in sorted(given.folder.rglob("meta.json")):
        run = read(meta.parent)
        compute, memory = fit(run)
        rest = range(len(run.rows) // 3, len(run.rows))
        told = figures(run, simulated(run, compute, memory), rest)
        real = figures(run, [(r[3], r[4]) for r in run.rows], rest)
        error = {k: told[k] / real[k] - 1 for k in real}
        cases.append({"run": run.name, "requests": len(run.rows), "fitted": {"compute": compute, "memory": memory},
                      "measured": real, "simulated": told, "error": error})  # fmt: skip
        print(run.name, compute, memory, {k: f"{100 * v:+.1f} %" for k, v in error.items()}, flush=True)
        if given.out is not None:
            result = {"benchmark": "simulator against vLLM", "source": "LLMServingSim's measured runs", "cases": cases}
            given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
