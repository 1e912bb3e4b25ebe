"""The simulator against this machine: a cost calibrated on one load, tested on another at shares of the capacity.

    python -m bench.sim.calibrated --out bench/results/sim-calibrated.json      (3 minutes on a quiet machine)

The load that is tested is served in real time by the engine's own loop (no HTTP), and simulated with the same arrivals and
limits.  A shared machine's speed changes by several percent within a minute, and at more than the capacity one percent of it is a
tenth of the time that requests wait.  So loads take turns: a piece of the calibration's load, some seconds of a tested one until
all its answers have ended, a piece again, another share of the capacity, and so on.  All pieces are fitted together, and an
episode is simulated at the speed (`scale`) that the pieces right before and after it had.  Nothing of a tested load is fitted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weft.bench.calibrate import Driver, Sample, Timings, fit, level, measure
from weft.cost.calibrated import Calibrated
from weft.exec.build import EngineConfig, Setup, build, prepare
from weft.hub import resolve
from weft.sim.cluster import Cluster, Setting
from weft.sim.machines import Model, hardware
from weft.sim.metrics import quantile
from weft.sim.workload import UNIQUE, Arrival
from weft.types import EngineFrame, RequestSpec, SamplingSpec, TokenItem, Tokens

PROMPT, OUTPUT = 120, 48
SHARES = (0.5, 0.8, 1.1)
"""Of the capacity."""
Row = tuple[float, float | None, float]
"""Of a request: TTFT, mean time between tokens, time to the end."""


def arrivals(rate: float, seconds: float, seed: int) -> list[Arrival]:
    """A Poisson load that the calibration has not seen: lognormal lengths, other numbers of sequences at once."""
    chance, now, found = random.Random(f"tested {seed}"), 0.0, list[Arrival]()
    sigma = (2 * 0.2) ** 0.5
    while True:
        now += chance.expovariate(rate)
        if now >= seconds:
            return found
        lengths = [max(1, min(700, round(m * chance.lognormvariate(-(sigma**2) / 2, sigma)))) for m in (PROMPT, OUTPUT)]
        found.append(Arrival(now, ((UNIQUE + len(found), lengths[0]),), lengths[1]))


class Others:
    """Processors that other processes keep busy, from the moment in which this is made."""

    def __init__(self) -> None:
        self.began, self.own, self.all = time.monotonic(), time.process_time(), self._busy()

    @staticmethod
    def _busy() -> float:
        """Seconds in which any processor did something, steal included."""
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")

    def share(self) -> float:
        own = time.process_time() - self.own
        return max(0.0, self._busy() - self.all - own) / (time.monotonic() - self.began)


def served(driver: Driver, load: list[Arrival], turn: int) -> tuple[list[Arrival], list[Row], float]:
    """The load in real time: when requests were in fact sent, what became of them, and when the last one ended."""
    chance, first_id = random.Random(f"served {turn}"), 1_000_000 * (turn + 1)
    specs = [
        RequestSpec(
            id=first_id + i, items=(TokenItem(tuple(chance.randrange(driver.vocab) for _ in range(a.prompt))),),
            sampling=SamplingSpec(temperature=0.0, max_tokens=a.output),
        )
        for i, a in enumerate(load)
    ]  # fmt: skip
    first: dict[int, float] = {}
    last: dict[int, float] = {}

    def hear(frame: EngineFrame) -> None:
        now = time.monotonic()
        for event in frame.events:
            if isinstance(event, Tokens):
                first.setdefault(event.id, now)
                last[event.id] = now

    began = time.monotonic() + 0.1
    driver.hear = hear
    driver.run(specs, lambda i: time.sleep(max(0.0, began + load[i].time_s - time.monotonic())))
    driver.hear = None
    sent = [replace(a, time_s=driver.sent[s.id] - began) for a, s in zip(load, specs, strict=True)]
    rows = [_row(a, first[s.id] - began, last[s.id] - began) for a, s in zip(sent, specs, strict=True)]
    return sent, rows, max(last.values()) - began


def _row(a: Arrival, first: float, last: float) -> Row:
    return first - a.time_s, (last - first) / (a.output - 1) if a.output > 1 else None, last - a.time_s


def figures(rows: Sequence[Row], duration: float, tokens: int) -> dict[str, Any]:
    out: dict[str, Any] = {"requests": len(rows), "duration_s": duration, "output_tok_s": tokens / duration}
    for i, name in enumerate(("ttft_s", "tpot_s", "e2e_s")):
        values = sorted(v for row in rows if (v := row[i]) is not None)
        out[name] = {"p50": quantile(values, 0.5), "p99": quantile(values, 0.99), "mean": statistics.fmean(values)}
    return out


def simulated(setup: Setup, calibration: Path, load: list[Arrival], scale: float = 1.0) -> tuple[list[Row], float]:
    """What becomes of requests in the simulator, and when the last one ends."""
    setting = Setting(
        model=Model("measured", setup.spec, setup.dtype), hardware=hardware("cpu2"),
        cost=Calibrated(file=str(calibration), scale=scale),
        parts=setup.stack.parts, limits=setup.limits, blocks=setup.plan.kv_blocks,
    )  # fmt: skip
    meter = Cluster(setting).run(load)
    return [_row(a, meter.first[i], meter.ended[i]) for i, a in enumerate(load)], meter.last_s


def capacity(setup: Setup, calibration: Path) -> float:
    """Requests a second of the tested kind that the engine ends while more of them wait than it can take."""
    crowd = arrivals(1000.0, 1.0, 1)
    rows, _ = simulated(setup, calibration, crowd)
    ends = sorted(a.time_s + row[2] for a, row in zip(crowd, rows, strict=True))
    low, high = len(ends) // 5, 3 * len(ends) // 5
    return (high - low) / (ends[high] - ends[low])


def piece(driver: Driver, timings: Timings, turn: int) -> list[Sample]:
    """A second or two of the calibration's load."""
    timings.samples = found = list[Sample]()
    driver.port.engine.tap = timings
    for i, (count, prompts) in enumerate(((32, (40, 100)), (5, (16, 250)), (12, (40, 250)), (20, (100, 250)))):
        driver.batch(10_000 + 10 * turn + i, count, prompts, (8, 16, 30))
        driver.trickle(20_000 + 10 * turn + i, 4, (16, 100, 250), (8, 24))
    driver.port.engine.tap = None
    return found


def speed(setup: Setup, calibration: Path, samples: list[Sample]) -> float:
    """How long these steps took together, in times of what the calibration says of them."""
    price = Calibrated(file=str(calibration)).on(hardware("cpu2"), Model("measured", setup.spec, setup.dtype).figures)
    return level([s.total_s for s in samples], [sum(price(s.load)) for s in samples])


def compared(real: dict[str, Any], told: dict[str, Any]) -> dict[str, float]:
    """Relative errors of the simulation."""
    errors = {"output_tok_s": told["output_tok_s"] / real["output_tok_s"] - 1}
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        for q in ("p50", "p99"):
            errors[f"{name} {q}"] = told[name][q] / real[name][q] - 1
    return errors


@dataclass(frozen=True, slots=True)
class Episode:
    """A load that was served.  around: steps of the calibration's load right before and after."""

    share: float
    load: list[Arrival]
    rows: list[Row]
    duration_s: float
    others: float
    around: list[Sample]


def episodes(
    setup: Setup, driver: Driver, timings: Timings, samples: list[Sample], given: argparse.Namespace
) -> list[Episode]:
    """Tested loads and pieces of the calibration's in turns; `samples` gets the latter's."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calibration.json"
        file.write_text(json.dumps(fit(samples)))
        most = capacity(setup, file)
    found, before = list[Episode](), piece(driver, timings, 0)
    samples += before
    for turn in range(given.episodes * len(SHARES)):
        share = SHARES[turn % len(SHARES)]
        others = Others()
        load, rows, duration = served(driver, arrivals(most * share, given.seconds, turn), turn)
        busy = others.share()
        after = piece(driver, timings, turn + 1)
        samples += after
        found.append(Episode(share, load, rows, duration, busy, [*before, *after]))
        before = after
        print(f"{share} of {most:.1f}/s: {len(load)} requests, others kept {busy:.2f} processors busy", flush=True)
    return found


def case(setup: Setup, file: Path, share: float, mine: Sequence[Episode]) -> dict[str, Any]:
    """What was measured and simulated at one share of the capacity."""
    rows, told, seconds, told_s, scales = list[Row](), list[Row](), 0.0, 0.0, list[float]()
    for e in mine:
        scales.append(speed(setup, file, e.around))
        found, duration = simulated(setup, file, e.load, scales[-1])
        rows, told, seconds, told_s = [*rows, *e.rows], [*told, *found], seconds + e.duration_s, told_s + duration
    tokens = sum(a.output for e in mine for a in e.load)
    real, simulation = figures(rows, seconds, tokens), figures(told, told_s, tokens)
    return {"share_of_capacity": share, "rate": len(rows) / sum(e.load[-1].time_s for e in mine),
            "others": max(e.others for e in mine), "scales": scales, "measured": real, "simulated": simulation,
            "error": compared(real, simulation)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0, help="of arrivals in an episode")
    parser.add_argument("--episodes", type=int, default=6, help="at each share of the capacity")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", default=None)
    given = parser.parse_args()
    config = EngineConfig(
        model=resolve(given.model), max_model_len=1024, max_num_seqs=32, threads=1, memory_bytes=900 << 20
    )
    setup = prepare(config)
    first = build(setup)
    samples = measure(build(setup, like=first), given.rounds)
    driver = Driver(first)
    model = Model("measured", setup.spec, setup.dtype)
    timings = Timings(first.engine, model.figures, len(setup.spec.layers), driver.sent)
    driver.batch(1, 32, (20, 100), (8,))  # warm
    try:
        done = episodes(setup, driver, timings, samples, given)
    finally:
        driver.close()
    calibration = fit(samples)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calibration.json"
        file.write_text(json.dumps(calibration))
        most = capacity(setup, file)
        cases = [case(setup, file, share, [e for e in done if e.share == share]) for share in SHARES]
    for c in cases:
        print(c["share_of_capacity"], {k: f"{100 * v:+.1f} %" for k, v in c["error"].items()}, flush=True)
    result = {"benchmark": "simulator against the engine", "model": "weft-tiny", "threads": setup.threads, "capacity_rps": most,
              "calibration": calibration, "cases": cases}  # fmt: skip
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
