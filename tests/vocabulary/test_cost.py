"""What the engine's pure half costs, in time: a long queue is nearly free, and one sequence hardly notices the machinery."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator

import pytest

from weft.config import Limits
from weft.core.engine import Engine
from weft.types import (
    GroupKind,
    GroupSpec,
    RequestSpec,
    SamplingSpec,
    StepResult,
    TokenItem,
    WorkResult,
)

pytestmark = pytest.mark.serial
GROUPS = [GroupSpec(name="full", kind=GroupKind.FULL, layers=(0,), entry_bytes=8, block_tokens=16)]
SEQS = 32
STEPS = 50
PROMPT = 40


class Loaded:
    """An engine with `requests` of 40 tokens of prompt, of which at most 32 run, and a clock around its two calls."""

    def __init__(self, requests: int, max_tokens: int) -> None:
        limits = Limits(max_model_len=4096, max_num_seqs=SEQS, max_rows=512, max_samples=512)
        self.engine = Engine(GROUPS, 4096, limits, vocab=1000)
        sampling = SamplingSpec(max_tokens=max_tokens)
        for i in range(requests):
            prompt = TokenItem(tuple((i * 7 + j * (1 + i % 11)) % 1000 for j in range(PROMPT)))
            self.engine.add(RequestSpec(id=i, items=(prompt,), sampling=sampling), 0.0)
        self.most = min(SEQS, requests)
        self.now = 0.0
        self.works = 0

    def step(self) -> tuple[float, float]:
        """Seconds of schedule and of commit."""
        self.now += 1.0
        began = time.perf_counter()
        plan, _ = self.engine.schedule(self.now)
        planned = time.perf_counter()
        facts = tuple(WorkResult(rows=w.count, tokens=(5,) if w.samples else ()) for w in plan.works)
        result = StepResult(step=plan.step, works=facts)
        told = time.perf_counter()
        self.engine.commit(self.now, plan, result)
        self.works = len(plan.works)
        return planned - began, time.perf_counter() - told

    def settle(self) -> Loaded:
        """Go on until everyone who may run decodes."""
        running = self.engine.scheduler.running
        while len(running) < self.most or not all(r.output for r in running.values()):
            self.step()
        return self

    @property
    def queued(self) -> int:
        return self.engine.stats.waiting


@pytest.fixture(autouse=True)
def _without_pauses() -> Iterator[None]:
    """The collector stays off while the clock runs; whatever earlier tests left is swept first."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def best_of(tries: int, measure: Callable[[], float]) -> float:
    """The least of several medians: the machine is shared, and only slowness that stays is the engine's."""
    return min(measure() for _ in range(tries))


def test_a_step_with_a_thousand_queued_requests_takes_a_millisecond_to_schedule() -> None:
    loaded = Loaded(1000 + SEQS, max_tokens=2000).settle()
    assert loaded.queued == 1000
    spent = best_of(3, lambda: statistics.median(loaded.step()[0] for _ in range(STEPS)))
    assert loaded.works == SEQS, "the steps that were measured are full"
    assert loaded.queued == 1000
    assert spent <= 1e-3, f"{spent * 1e6:.0f} us"


def test_so_does_a_step_in_which_requests_leave_and_enter() -> None:
    """Sixteen tokens each: of the 32, two end in an average step, and as many are let in."""
    loaded = Loaded(1600, max_tokens=16)
    for i in range(SEQS):  # ends are spread over the steps
        loaded.engine.cancel(i)
        loaded.step()
    waited = loaded.queued
    spent = best_of(3, lambda: statistics.mean(sorted(loaded.step()[0] for _ in range(STEPS))[: STEPS - 5]))
    assert waited - loaded.queued >= 3 * STEPS, "hardly anybody entered in the steps that were measured"
    assert loaded.queued >= 1000
    assert spent <= 1e-3, f"{spent * 1e6:.0f} us"


def test_the_cost_does_not_grow_with_the_queue() -> None:
    short, long = Loaded(1000 + SEQS, max_tokens=2000).settle(), Loaded(50_000 + SEQS, max_tokens=2000).settle()
    assert (short.queued, long.queued) == (1000, 50_000)

    def ratio() -> float:
        turns = [(short.step()[0], long.step()[0]) for _ in range(STEPS)]
        return statistics.median(t[1] for t in turns) / statistics.median(t[0] for t in turns)

    assert best_of(3, ratio) <= 2.0


def test_one_decode_costs_next_to_nothing() -> None:
    loaded = Loaded(1, max_tokens=2000).settle()
    spent = best_of(3, lambda: statistics.median(sum(loaded.step()) for _ in range(STEPS)))
    assert loaded.works == 1
    assert spent <= 150e-6, f"{spent * 1e6:.0f} us"
