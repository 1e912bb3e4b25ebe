"""Calibration: how long steps take on this machine, and the cost that is fitted to it.

The engine's own loop runs a mixture of loads and its decisions are listened to, so that what a step costs beyond the model (the
scheduler, frames, the interpreter) is in the figures.  Each of three parts is fitted by itself, with coefficients that are not
negative: first through the middle of the steps, to know which were held up, then through the means of the others (`means`):

    model     W(rows) + pair_s pairs + entry_s entries of decodes + prompt_entry_s entries of prompts
    sampling  sampling_s + sample_s samples
    the rest  step_s + sequence_s works + enter_s sequences that begin + prompt_row_s rows of prompts + idle_s after a rest

All of them are then raised until the steps take together what they took (`level`).
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.core.engine import Engine
from weft.errors import EngineError
from weft.exec.build import Runtime
from weft.exec.host import settle
from weft.exec.thread import EngineThread
from weft.sim.load import load_of
from weft.sim.machines import Model
from weft.slots.cost import Figures, Load
from weft.types import (
    Add,
    Added,
    Committed,
    EngineFrame,
    Entry,
    Finished,
    Planned,
    Rejected,
    RequestSpec,
    SamplingSpec,
    TokenItem,
)  # fmt: skip

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048)
COUNTS = (1, 2, 3, 5, 8, 12, 20, 32, 48)
PAUSE_S = 0.02
"""Mean time between two requests that trickle in."""
TURNS, SWEEPS = 6, 600
"""Times that the steps are weighed anew, and rounds of a fit."""
HELD_UP = 3.0
"""A step that takes so many times what it should was held up by something else on the machine."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One step.  seconds: of the model, of sampling, and of all else since the step before."""

    load: Load
    model_s: float
    sample_s: float
    rest_s: float

    @property
    def total_s(self) -> float:
        return self.model_s + self.sample_s + self.rest_s


class Timings:
    """Listens to an engine: the time from one step's end to the next one's.

    Where the engine had nothing to do it counts from when the request was sent (`sent`, by request), so that the thread's
    waking up is in it.
    """

    def __init__(self, engine: Engine, model: Figures, layers: int, sent: Mapping[int, float]) -> None:
        self.engine, self.model, self.layers, self.sent = engine, model, layers, sent
        self.samples: list[Sample] = []
        self._plan: Planned | None = None
        self._since: float | None = None
        self._idle = False

    def __call__(self, entry: Entry) -> None:
        """What listening takes counts for no step."""
        began = time.monotonic()
        self._hear(entry)
        if self._since is not None:
            self._since += time.monotonic() - began

    def _hear(self, entry: Entry) -> None:
        if isinstance(entry, Added):
            asked = self.sent.get(entry.spec.id, entry.now)
            if len(self.engine.requests()) == 1 and (self._since is None or asked > self._since):
                self._since, self._idle = asked, True
        elif isinstance(entry, Planned):
            self._plan = entry
        elif isinstance(entry, Committed):
            if self._plan is not None and self._since is not None and self._plan.plan.works:
                result = entry.result
                rest = max(0.0, entry.now - self._since - result.forward_s - result.sample_s)
                load = load_of(self._plan.plan, self.model, self.layers)
                load.idle = int(self._idle)
                self.samples.append(Sample(load, result.forward_s, result.sample_s, rest))
            self._since, self._plan, self._idle = entry.now, None, False


def specs(
    seed: int, count: int, prompts: Sequence[int], outputs: Sequence[int], vocab: int, first: int
) -> list[RequestSpec]:
    """Requests of random tokens, which share nothing, and end by their length."""
    chance = random.Random(f"calibrate {seed}")
    return [
        RequestSpec(
            id=first + i, items=(TokenItem(tuple(chance.randrange(vocab) for _ in range(chance.choice(prompts)))),),
            sampling=SamplingSpec(temperature=0.0, max_tokens=chance.choice(outputs)),
        )
        for i in range(count)
    ]  # fmt: skip


class Driver:
    """An engine's thread that takes batches of requests.  close it."""

    def __init__(self, runtime: Runtime) -> None:
        self.vocab = runtime.setup.spec.vocab
        self.port = EngineThread(runtime.engine, runtime.executor, None, idle_check=False)
        self.port.subscribe(self._hear)
        self.hear: Callable[[EngineFrame], None] | None = None
        self._left: set[int] = set()
        self._done = threading.Event()
        self._wrong: str | None = None
        self._ids = 0
        self.sent: dict[int, float] = {}
        """When each request was sent."""

    def _hear(self, frame: EngineFrame) -> None:
        if self.hear is not None:
            self.hear(frame)
        for event in frame.events:
            if isinstance(event, Rejected) or (isinstance(event, Finished) and event.reason == "error"):
                self._wrong = event.message if isinstance(event, Rejected) else event.error
            if isinstance(event, Finished | Rejected):
                self._left.discard(event.id)
        if not self._left:
            self._done.set()

    def run(self, requests: Sequence[RequestSpec], before: Callable[[int], None] = lambda i: None) -> None:
        """Send requests, each after `before(its number)`, and wait for all answers.  Raises EngineError."""
        self._left = {spec.id for spec in requests}
        self._done.clear()
        for i, spec in enumerate(requests):
            before(i)
            self.sent[spec.id] = time.monotonic()
            self.port.send(Add(spec))
        while not self._done.wait(1.0):
            if self.port.error() is not None:
                break
        if self._wrong is not None or self.port.error() is not None:
            raise EngineError(f"the load did not run: {self._wrong or self.port.error()}")

    def batch(self, seed: int, count: int, prompts: Sequence[int], outputs: Sequence[int]) -> None:
        self._ids += count
        self.run(specs(seed, count, prompts, outputs, self.vocab, self._ids))

    def trickle(self, seed: int, count: int, prompts: Sequence[int], outputs: Sequence[int]) -> None:
        """As `batch`, one after the other, so that prompts of a few rows are computed beside those who decode."""
        chance = random.Random(f"trickle {seed}")
        self._ids += count
        requests = specs(seed, count, prompts, outputs, self.vocab, self._ids)
        self.run(requests, lambda i: time.sleep(chance.expovariate(1.0) * PAUSE_S))

    def close(self) -> None:
        self.port.close()


def measure(
    runtime: Runtime, rounds: int = 2, tell: Callable[[str], None] | None = None, counts: Sequence[int] = COUNTS
) -> list[Sample]:
    """Step times of a mixture of loads.  The engine is used up: it is closed afterwards.  counts: sequences at once."""
    limits, spec = runtime.setup.limits, runtime.setup.spec
    figures = Model("measured", spec, runtime.setup.dtype).figures
    longest = min(limits.max_model_len - 40, runtime.setup.plan.kv_blocks * runtime.setup.plan.block_tokens // 2)
    prompts = sorted({max(1, min(longest, n)) for n in (4, 16, 40, 100, 250, 600, 1400)})
    driver = Driver(runtime)
    timings = Timings(runtime.engine, figures, len(spec.layers), driver.sent)
    try:
        driver.batch(0, 4, prompts[:3], (8,))  # warm
        settle()
        runtime.engine.tap = timings
        for turn in range(rounds):
            for count in counts:
                if tell is not None:
                    tell(f"{min(count, limits.max_num_seqs)} sequences, round {turn + 1} of {rounds}")
                for i, few in enumerate((prompts[:2], prompts[2:4], prompts)):
                    driver.batch(100 * turn + 10 * count + i, min(count, limits.max_num_seqs), few, (4, 16, 30))
                driver.trickle(turn + count, 2 * count, prompts[:-1], (8, 24, 60))
    finally:
        driver.close()
        gc.unfreeze()  # the engine, whose parts hold each other, can be collected
    return timings.samples


def fit(samples: Sequence[Sample]) -> dict[str, Any]:
    """A calibration, as `cost=calibrated` reads it, and how far the samples are from it."""
    if len(samples) < 20:
        raise EngineError(f"{len(samples)} steps were measured, which is too few for a fit")
    top = max(s.load.rows for s in samples)
    knots = [k for k in KNOTS if k < top] + [top]
    basis = [
        [*_hats(knots, s.load.rows), sum(s.load.prompt_pairs), sum(s.load.decode_entries), sum(s.load.prompt_entries)]
        for s in samples
    ]
    model = means(basis, [s.model_s for s in samples])
    picks = [[float(s.load.samples > 0), float(s.load.samples)] for s in samples]
    sampling = means(picks, [s.sample_s for s in samples])
    others = [[1.0, *_hosts(s.load)] for s in samples]
    rest = means(others, [s.rest_s for s in samples])
    found = {
        "rows": [[k, float(w)] for k, w in zip(knots, model[: len(knots)], strict=True)],
        "pair_s": model[-3], "entry_s": model[-2], "prompt_entry_s": model[-1],
        "sampling_s": sampling[0], "sample_s": sampling[1],
        **dict(zip(("step_s", "sequence_s", "enter_s", "prompt_row_s", "idle_s"), rest, strict=True)),
        "block_s": 0.0,
    }  # fmt: skip
    told = [float(v) for v in np.array(basis) @ model + np.array(picks) @ sampling + np.array(others) @ rest]
    found, told = raised(found, told, level([s.total_s for s in samples], told))
    errors = [abs(t - s.total_s) / s.total_s for t, s in zip(told, samples, strict=True)]
    found["steps"] = len(samples)
    found["median_error"] = statistics.median(errors)
    found["total_error"] = sum(told) / sum(s.total_s for s in samples) - 1.0
    return found


def _hosts(load: Load) -> tuple[float, float, float, float]:
    """What the time of the host goes by, beside each step's own."""
    prompt_rows = max(0, load.rows - load.decode_rows)
    return float(load.works), float(load.entered), float(prompt_rows), float(load.idle)


def level(measured: Sequence[float], told: Sequence[float]) -> float:
    """How many times as long as they were told steps took in all, those left out that something held up.

    The fit goes through the middle of the steps, and their times have a tail to one side: what a second of many steps takes is
    their mean.
    """
    kept = [(m, t) for m, t in zip(measured, told, strict=True) if m < HELD_UP * t]
    return sum(m for m, _ in kept) / sum(t for _, t in kept) if kept else 1.0


def raised(found: dict[str, Any], told: list[float], scale: float) -> tuple[dict[str, Any], list[float]]:
    """A calibration and what it told, both so many times as long."""
    rows = [[k, scale * w] for k, w in found["rows"]]
    return {"rows": rows, **{k: scale * v for k, v in found.items() if k != "rows"}}, [scale * t for t in told]


def _hats(knots: Sequence[int], rows: int) -> list[float]:
    """Weights of the two knots beside `rows`."""
    out = [0.0] * len(knots)
    i = max(k for k in range(len(knots)) if knots[k] <= max(rows, knots[0]))
    if i + 1 == len(knots):
        out[i] = 1.0
    else:
        share = (rows - knots[i]) / (knots[i + 1] - knots[i])
        out[i], out[i + 1] = 1.0 - share, share
    return out


def means(basis: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:
    """Coefficients that are not negative, so that steps of every kind take together what they took.

    Times have a tail to one side, longer for small steps than for large ones, so a fit through their middle with one factor on it
    makes small steps too short and large ones too long.  Least squares over what a step is told to take balance the sum of
    errors in each coefficient.  Steps that something held up are left out.
    """
    a, y = np.array(basis), np.maximum(np.array(wanted), 1e-7)
    x = np.array(nonnegative(basis, wanted))
    for _ in range(TURNS):
        told = np.maximum(a @ x, 1e-9)
        weight = np.where(y < HELD_UP * told, 1.0, 0.0) / told
        x = _descend(a.T @ (a * weight[:, None]), a.T @ (weight * y), x)
    return [float(v) for v in x]


def _descend(gram: Any, target: Any, x: Any) -> Any:
    """The least of a quadratic form where nothing is negative: one coordinate after the other."""
    x = x.copy()
    for _ in range(SWEEPS):
        for j in range(len(x)):
            if gram[j, j] > 0:
                x[j] = max(0.0, x[j] + (target[j] - gram[j] @ x) / gram[j, j])
    return x


def nonnegative(basis: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:
    """Coefficients that are not negative, by the least sum of relative errors: one coordinate after the other."""
    y = np.maximum(np.array(wanted), 1e-7)
    a = np.array(basis) / y[:, None]
    scale = np.maximum(np.sqrt((a**2).sum(0)), 1e-30)
    a = a / scale
    x, weights = np.zeros(a.shape[1]), np.ones(len(y))
    for _ in range(TURNS):
        x = _descend(a.T @ (a * weights[:, None]), a.T @ weights, x)
        # A step that something else on the machine held up has a large error; it is not to move the others.
        weights = 1.0 / np.maximum(np.abs(a @ x - 1.0), 0.02)
    return [float(v) for v in x / scale]


def text(calibration: dict[str, Any], machine: dict[str, Any]) -> str:
    """What `cost=calibrated` reads."""
    return json.dumps({**calibration, "machine": machine}, indent=1) + "\n"
