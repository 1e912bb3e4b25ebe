"""Refusal of what can't be in time any more, worked by hand: a step takes one second, and has 4 rows."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from tests.sim.test_replay import rewritten
from weft.config import Limits, Stacks, build_stack
from weft.core.engine import Engine
from weft.core.lateness import RECENT_S, Lateness
from weft.exec.null import NullExecutor
from weft.exec.record import tap
from weft.exec.thread import EngineThread
from weft.registry import parse
from weft.sim.executor import facts
from weft.sim.replay import Entries, replay
from weft.types import (
    Add,
    EngineFrame,
    Entry,
    Finished,
    GroupKind,
    GroupSpec,
    Planned,
    Preempted,
    Rejected,
    RequestSpec,
    SamplingSpec,
    TokenItem,
    Tokens,
)

GROUPS = (GroupSpec(name="full", kind=GroupKind.FULL, layers=(0,), entry_bytes=8, block_tokens=4),)


@dataclass
class World:
    """An engine whose step takes `fixed_s`, and `row_s` for each row.  first, refused: when, by request."""

    policy: str
    rows: int = 4
    seqs: int = 8
    blocks: int = 400
    fixed_s: float = 1.0
    row_s: float = 0.0
    now: float = 0.0
    log: list[dict[int, int]] = field(default_factory=list)
    first: dict[int, float] = field(default_factory=dict)
    refused: dict[int, float] = field(default_factory=dict)
    said: dict[int, str] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        limits = Limits(max_model_len=400, max_num_seqs=self.seqs, max_rows=self.rows, max_samples=self.seqs)
        self.engine = Engine(GROUPS, self.blocks, limits, build_stack([f"schedule={self.policy}"]))

    def ask(
        self, id: int, prompt: int | tuple[int, ...], output: int = 1, ttft_s: float | None = 0.0, **more: object
    ) -> None:
        ids = prompt if isinstance(prompt, tuple) else tuple(range(1000 * id, 1000 * id + prompt))
        sampling = SamplingSpec(max_tokens=output)
        spec = RequestSpec(id=id, items=(TokenItem(ids),), sampling=sampling, ttft_s=ttft_s, **more)  # type: ignore[arg-type]
        assert self.engine.add(spec, self.now) == []

    def step(self) -> None:
        plan, events = self.engine.schedule(self.now)
        if plan.works:
            self.log.append({w.request: len(w.tokens) for w in plan.works})
        for event in events:
            if isinstance(event, Rejected):
                assert (event.kind, event.code) == ("capacity", "too_late")
                assert event.id not in self.refused
                self.refused[event.id], self.said[event.id] = self.now, event.message
            else:
                assert isinstance(event, Preempted)
        self.now += self.fixed_s + self.row_s * plan.rows
        for told in self.engine.commit(self.now, plan, facts(plan)):
            assert told.id not in self.refused, "a refused request is told of nothing else"
            if isinstance(told, Tokens):
                self.first.setdefault(told.id, self.now)
            if isinstance(told, Finished):
                self.ended.add(told.id)
        self.engine.check()

    def run(self) -> World:
        while self.engine.has_work:
            self.step()
        return self


def crowd(policy: str) -> World:
    """At once: prompts of 8, 8, 4 and 12 rows, whose first tokens are due after 4 s."""
    world = World(policy)
    for id, prompt in enumerate((8, 8, 4, 12)):
        world.ask(id, prompt)
    return world.run()


def test_who_cannot_make_it_any_more_is_refused_at_once() -> None:
    """Slack at first: 4 s less a quarter for each row, so request 3 (1 s) has three steps, and ends at 3 s.

    Until 2 s the others could still make it if they were next: 2 s + 8 rows of a quarter second = 4 s.  At 3 s requests 0 and
    1 could not, and are refused; 2, with 4 rows, can, and is in time to the second.
    """
    world = crowd("deadline(ttft_s=4, row_s=0.25)")
    assert world.first == {3: 3.0, 2: 4.0}
    assert world.refused == {0: 3.0, 1: 3.0}
    assert world.log == [{4: 4}, {4: 4}, {4: 4}, {3: 4}]
    assert "has waited 3 s, and its 8 rows take at least 2 s more" in world.said[0]
    assert world.engine.stats.refused == 2
    assert world.engine.stats.finished == 2
    # First come, first served: two are in time as well, and the other two are served all the same, at 5 s and 8 s.
    assert crowd("fcfs").first == {0: 2.0, 1: 4.0, 2: 5.0, 3: 8.0}
    late = crowd("deadline(ttft_s=4, row_s=0.25, refuse=False)")
    assert late.refused == {}
    assert late.first == {3: 3.0, 2: 4.0, 0: 6.0, 1: 8.0}


def test_without_a_deadline_nobody_is_refused() -> None:
    world = World("deadline(ttft_s=4, row_s=0.25)")
    for id, prompt in enumerate((8, 8, 4, 12)):
        world.ask(id, prompt, ttft_s=None)
    assert world.run().refused == {}
    assert set(world.first) == world.ended == {0, 1, 2, 3}
    assert max(world.first.values()) == 8.0


def test_a_request_brings_its_own_deadline() -> None:
    world = World("deadline(ttft_s=4, row_s=0.25)")
    for id, ttft_s in enumerate((7.0, 3.0, 0.0)):
        world.ask(id, 8, ttft_s=ttft_s)
    # 1 is due at 3 s, 2 at 4 s, 0 at 7 s: that is the order, and each is in time.
    assert world.run().first == {1: 2.0, 2: 4.0, 0: 6.0}
    assert world.refused == {}


def test_rows_that_are_computed_already_are_not_counted() -> None:
    """A step has 3 rows, so that a row takes a third of a second, and a block has 4.

    At 1 s request 0 has 3 of its 12 rows, and the index has none.  Request 1, whose first 12 rows are those, is due at 5 s:
    13 rows would take it until 5 1/3 s, the 10 that nobody has until 4 1/3 s, and its token does come at 5 s.
    Request 2 is as long, and begins like nobody's.
    """
    world = World("deadline(ttft_s=4, row_s=0.01)", rows=3)
    head = tuple(range(1, 13))
    world.ask(0, head, output=3, ttft_s=60.0)
    world.step()
    world.ask(1, (*head, 99))
    world.ask(2, 13)
    world.run()
    assert world.refused == {2: 1.0}
    assert world.first == {0: 4.0, 1: 5.0}
    world.ask(3, (*head, 98), ttft_s=0.5)  # the index has it now
    world.ask(4, 13, ttft_s=0.5)
    world.run()
    assert 3 in world.first
    assert set(world.refused) == {2, 4}


def test_who_has_begun_is_never_refused() -> None:
    world = World("deadline(ttft_s=2, row_s=0.01)")
    world.ask(0, 20)  # nothing is known of steps yet
    assert world.run().refused == {}
    assert world.first == {0: 5.0}


def test_nor_who_was_preempted_on_the_way() -> None:
    world = World("deadline(ttft_s=8, row_s=0.01)", blocks=16)
    for id in range(3):
        world.ask(id, 4, output=20, ttft_s=60.0)
    for _ in range(3):
        world.step()
    world.ask(3, 20)  # 5 s by itself, but one row in a step beside those who decode
    world.run()
    assert world.refused == {}
    assert world.engine.stats.preemptions > 0
    assert world.first[3] > 3.0 + 8.0
    assert world.ended == {0, 1, 2, 3}


def test_families_are_refused_as_a_whole() -> None:
    world = World("deadline(ttft_s=1, row_s=0.01)", seqs=4)
    world.ask(0, 20, ttft_s=60.0)
    world.step()
    world.ask(1, 8, n=3)
    world.ask(2, 8, techniques=("search=beam(width=2)",), n=2)
    world.ask(3, 8, techniques=("sample=cad",), companions=((TokenItem((1, 2, 3)),),))
    world.run()
    assert set(world.refused) == {1, 2, 3}
    assert world.engine.requests() == []
    assert world.engine.programs.told() == []


@pytest.mark.parametrize("seed", range(6))
def test_what_could_still_be_served_is_not_refused(seed: int) -> None:
    """By what a request takes with the machine for itself, which is known here: chunks of a step's rows, one after another.

    And whoever is not refused had its turn before it was due.
    """
    chance = random.Random(seed)
    rows, fixed_s, row_s = chance.choice([4, 16]), chance.choice([0.0, 0.2, 1.0]), chance.choice([0.01, 0.1])
    world = World("deadline(ttft_s=3, row_s=0.05)", rows=rows, fixed_s=fixed_s, row_s=row_s)
    asked = {}
    for id in range(80):
        prompt, ttft_s = chance.randrange(1, 60), chance.choice([0.0, 1.0, 6.0])
        asked[id] = (world.now, prompt, ttft_s or 3.0)
        world.ask(id, prompt, chance.randrange(1, 9), ttft_s=ttft_s)
        for _ in range(chance.randrange(3)):
            if world.engine.has_work:
                world.step()
    world.run()
    assert set(world.refused) | world.ended == asked.keys()
    assert world.refused
    by_estimate = 0
    for id, at in world.refused.items():
        arrival, prompt, limit = asked[id]
        alone = -(-prompt // rows) * fixed_s + prompt * row_s
        assert at + alone > arrival + limit
        by_estimate += at <= arrival + limit
    assert by_estimate


def estimate() -> Lateness:
    world = World("deadline", rows=100)
    assert world.engine.lateness is not None
    return world.engine.lateness


def test_small_steps_say_nothing_of_large_ones() -> None:
    lateness = estimate()
    lateness.planned(1, 0.0, 5, 5)
    lateness.committed(1, 1.0, 5)
    assert lateness.least_s(5, 1.0) == 1.0
    assert lateness.least_s(3, 1.0) == pytest.approx(0.6)
    assert lateness.least_s(6, 1.0) == 0.0, "a step of 6 rows might take as long as one of 5"
    lateness.planned(2, 1.0, 100, 60)
    lateness.committed(2, 3.0, 100)
    assert lateness.least_s(6, 3.0) == pytest.approx(0.12)
    assert lateness.least_s(5, 3.0) == pytest.approx(0.1), "the cheapest row counts"
    assert lateness.least_s(250, 3.0) == pytest.approx(5.0), "steps of 100 rows"
    lateness.planned(3, 3.0, 100, 40)
    lateness.committed(3, 3.1, 100)
    assert lateness.least_s(250, 3.1) == pytest.approx(5.0), "steps that mostly decode say nothing"


def test_a_slow_step_is_forgotten() -> None:
    lateness = estimate()
    lateness.planned(1, 0.0, 100, 100)
    lateness.committed(1, 50.0, 100)
    assert lateness.least_s(100, 59.9) == 50.0
    assert lateness.least_s(100, 50.0 + RECENT_S) == 0.0


def test_plans_in_flight_at_once_are_not_counted_twice() -> None:
    lateness = estimate()
    for step, (made, ended) in enumerate(((0.0, 1.5), (0.1, 2.0)), 1):
        lateness.planned(step, made, 100, 100)
        if step == 2:
            lateness.committed(1, 1.5, 100)
            lateness.committed(2, ended, 100)
    assert lateness.least_s(100, 2.0) == pytest.approx(0.5)


def test_only_who_is_asked_to_refuses() -> None:
    assert World("fcfs").engine.lateness is None
    assert World("deadline(refuse=False)").engine.lateness is None
    assert parse("schedule=deadline").build().refuses


# ---------------------------------------------------------------------------------------------- the record


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an engine's thread, on the real clock: every third request is late before it is looked at."""
    path = tmp_path_factory.mktemp("refusal") / "engine.record"
    stacks = Stacks(build_stack(("schedule=deadline(ttft_s=600)",)))
    engine = Engine(GROUPS, 60, Limits(max_model_len=120, max_num_seqs=4, max_rows=16, max_samples=4), stacks, vocab=64)
    record = tap(engine, path)
    port = EngineThread(engine, NullExecutor(GROUPS, vocab=64, stacks=stacks), SimpleNamespace(), foretell=True)
    left, done, refused = set(range(18)), threading.Event(), set[int]()

    def sink(frame: EngineFrame) -> None:
        refused.update(e.id for e in frame.events if isinstance(e, Rejected))
        left.difference_update(e.id for e in frame.events if isinstance(e, Finished | Rejected))
        if not left:
            done.set()

    port.subscribe(sink)
    for i in range(18):
        sampling = SamplingSpec(max_tokens=20, temperature=1.0)
        ttft_s = (1e-9, 0.0, None)[i % 3]
        port.send(
            Add(
                RequestSpec(id=i, items=(TokenItem(tuple(range(i, i + 20))),), sampling=sampling, seed=i, ttft_s=ttft_s)
            )
        )
    assert done.wait(60)
    assert port.stats.refused == 6
    assert refused == set(range(0, 18, 3))
    port.close()
    record.close()
    return path


def test_refusals_are_made_again(record: Path) -> None:
    found = replay(record)
    assert found.difference is None
    assert found.refusals == 6
    assert [i for _, e in Entries(record) if isinstance(e, Planned) for i in e.refused] == list(range(0, 18, 3))


def test_a_refusal_that_was_not_decided_is_found(record: Path, tmp_path: Path) -> None:
    def other(number: int, entry: Entry) -> Entry:
        if isinstance(entry, Planned) and entry.refused:
            return msgspec.structs.replace(entry, refused=entry.refused[1:])
        return entry

    found = replay(rewritten(record, tmp_path / "r", other))
    assert found.difference is not None
    assert "refused as too late" in found.difference
