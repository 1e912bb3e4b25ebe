"""Queues that schedules keep themselves are in their order, and a step asks about few of those who wait."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from bench.sim.growth import cases
from tests.schedule.test_policies import GROUPS, trial
from weft.config import Limits, build_stack
from weft.core.engine import Engine
from weft.core.lateness import Lateness
from weft.core.request import Request
from weft.kv.offload.file import File
from weft.registry import lookup, names, parse
from weft.sim.executor import facts
from weft.sim.kinds import cluster_of
from weft.sim.run import Wanted, load, setting
from weft.slots import StepView
from weft.types import GroupKind, GroupSpec, RequestSpec, SamplingSpec, TokenItem

OWN = [name for name in names("schedule") if getattr(lookup("schedule", name), "queues", False)]


def asked(i: int, chance: random.Random) -> RequestSpec:
    """Beginnings, tenants, priorities and lengths of all kinds."""
    head = (chance.randrange(4),) * chance.choice([0, 16, 32, 64])
    ids = (*head, *range(1000 + 200 * i, 1000 + 200 * i + chance.randrange(1, 40)))
    return RequestSpec(
        id=i, items=(TokenItem(ids),), priority=chance.randrange(2), salt=b"t%d" % chance.randrange(5), ttft_s=0.0,
        sampling=SamplingSpec(max_tokens=chance.randrange(1, 30)),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", OWN)
def test_the_first_is_the_least_of_all_who_wait(name: str, seed: int) -> None:
    """Against asking everybody: after each of many arrivals, departures, turns, rows and gaps without anybody."""
    policy: Any = parse(
        f"schedule={name}({'patience_s=3.0, block=16, most=6' if name == 'cache_aware' else ''})"
    ).build()
    if name == "batchllm":
        policy.prefix = 16
    stack, chance, now = build_stack(), random.Random(seed), 0.0
    waiting: dict[int, Request] = {}
    gone: list[Request] = []
    ranked = 0
    for i in range(600):
        now += chance.choice([0.0, 0.01, 0.3])
        kind = chance.random()
        if kind < 0.5 or not waiting:
            r = (
                gone.pop()
                if gone and chance.random() < 0.2
                else Request(i, asked(i, chance), stack, index=0, seed=0, arrival=now, models=1, groups=1)
            )
            waiting[r.rid] = r
            policy.put(r, now)
        elif kind < 0.6:
            policy.drop(waiting.pop(chance.choice(list(waiting))))
        elif kind < 0.62:
            for r in waiting.values():
                policy.drop(r)
            waiting.clear()
        else:
            step = StepView(now, 64, 1, 4, len(waiting))
            r = policy.first(now)
            if policy.admit(r, step):
                policy.drop(waiting.pop(r.rid))
                policy.quota(r, step)
                gone.append(r)
        best = min(waiting.values(), key=lambda r: (policy.order(r, now), r.rid), default=None)
        assert policy.first(now) is best
        ranked += best is not None and best.rid != min(waiting)
    assert ranked > 50  # by arrival it would have been another one


def taken(policy: Any, most: int, now: float, waiting: dict[int, Request]) -> list[Request]:
    """Whom a copy of the policy takes in one after the other, each with its whole prompt."""
    twin = copy.deepcopy(policy, {id(r): r for r in waiting.values()})
    step, found = StepView(now, 10_000, 1, 0, len(waiting)), list[Request]()
    while len(found) < most and (r := twin.first(now)) is not None:
        assert twin.admit(r, step)
        twin.drop(r)
        twin.quota(r, step)
        found.append(r)
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", OWN)
def test_who_comes_next_is_known_in_order(name: str, seed: int) -> None:
    """Those for whom stored blocks are fetched: whom it would take one after the other, or, where to take one moves the others to
    the front (their beginning is then cached), who stand first now."""
    policy: Any = parse(f"schedule={name}({'patience_s=2.0, block=16' if name == 'cache_aware' else ''})").build()
    if name == "batchllm":
        policy.prefix = 16
    stack, chance, now = build_stack(), random.Random(seed), 0.0
    waiting: dict[int, Request] = {}
    several = 0
    for i in range(300):
        now += chance.choice([0.0, 0.01, 0.1])
        if chance.random() < 0.6 or not waiting:
            r = Request(i, asked(i, chance), stack, index=0, seed=0, arrival=now, models=1, groups=1)
            waiting[r.rid] = r
            policy.put(r, now)
        else:
            r = policy.first(now)
            policy.admit(r, StepView(now, 64, 1, 4, len(waiting)))
            policy.drop(waiting.pop(r.rid))
            policy.quota(r, StepView(now, 64, 1, 4, len(waiting)))
        if name == "cache_aware":
            wanted = sorted(waiting.values(), key=lambda r: (policy.order(r, now), r.rid))[:5]
        else:
            wanted = taken(policy, 5, now, waiting)
        assert [r.rid for r in policy.heads(5, now)] == [r.rid for r in wanted]
        several += len(wanted) == 5
    assert several > 100


@pytest.mark.parametrize("name", [*OWN, "fcfs"])
def test_what_is_stored_is_fetched_for_several(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(File, "prefetch", lambda self, waiting: told.append(len(waiting)) or ())
    stack = build_stack([f"schedule={name}", "kv.offload=file(disk='1MiB', memory='64K', lookahead=3)"])
    engine = Engine(GROUPS, 200, Limits(max_model_len=120, max_num_seqs=1, max_rows=200, max_samples=8), stack)
    for i in range(6):
        engine.add(asked(i, random.Random(i)), 0.0)
    assert engine.kv.tiers is not None
    engine.kv.tiers.save((0, b"something"), 1)  # nothing is fetched where nothing is stored
    engine.schedule(0.0)
    assert told == [3]


class Counted(dict[int, Request]):
    """Requests that wait, and how many of them were looked at."""

    looked = 0

    def __contains__(self, rid: object) -> bool:
        self.looked += 1
        return super().__contains__(rid)

    def __iter__(self) -> Iterator[int]:
        self.looked += len(self)
        return super().__iter__()

    def values(self) -> Any:
        self.looked += len(self)
        return super().values()


def lines(work: Callable[[], object]) -> int:
    """How many lines of weft are executed, a loop's anew in each of its turns."""
    count = 0

    def line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += 1
        return line

    def call(frame: FrameType, event: str, argument: object) -> Any:
        return line if "/weft/" in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def thirty_steps(name: str, waiting: int) -> int:
    """Lines that 30 steps take with so many who wait, and how many of these are looked at.  As many have left before."""
    limits = Limits(max_model_len=400, max_num_seqs=8, max_rows=64, max_samples=8, max_waiting=10**6)
    groups, chosen = GROUPS, trial(name) if name != "deadline" else "deadline(ttft_s=1000.0)"
    if lookup("schedule", name).layered:  # type: ignore[attr-defined]
        parked = GroupSpec(name="parked", kind=GroupKind.PARKED, layers=(0, 1), entry_bytes=8, block_tokens=4)
        groups = [GroupSpec(name="full", kind=GroupKind.FULL, layers=(0, 1), entry_bytes=8, block_tokens=4), parked]
    engine = Engine(groups, 400, limits, build_stack([f"schedule={chosen}"]), layers=len(groups))
    chance = random.Random(1)
    for i in range(2 * waiting):
        assert engine.add(asked(i, chance), 0.0) == []
    for _ in range(waiting):
        head = engine.scheduler.queue.first(0.0)
        assert head is not None
        assert engine.cancel(head.id)

    def step(at: int) -> None:
        plan, _ = engine.schedule(0.001 * at)
        engine.commit(0.001 * (at + 1), plan, facts(plan))

    step(0)
    engine.scheduler.waiting = seen = Counted(engine.scheduler.waiting)
    count = lines(lambda: [step(at) for at in range(1, 31)])
    assert len(engine.scheduler.waiting) > waiting - 360
    return count + seen.looked


@pytest.mark.parametrize("name", names("schedule"))
def test_a_step_costs_the_same_however_many_wait(name: str) -> None:
    few, many = thirty_steps(name, 400), thirty_steps(name, 8000)
    assert many < 1.3 * few, (few, many)


def per_request(requests: int, given: dict[str, Any]) -> float:
    """Lines of a simulation, without what it takes to begin, for each request; all come at once."""
    images = 2 * ("epd" in given.get("policy", ""))
    trace = (
        f"poisson(rate=1e7, requests={requests}, images={images}, prompt=40, output=4, tenants={requests // 10}, "
        "shared=16, urgent=0.1)"
    )
    wanted = Wanted(trace=trace, max_model_len=2048, max_num_seqs=4, seed=1, **given)
    cluster, arrivals = cluster_of(setting(wanted)), list(load(wanted))
    count = lines(lambda: cluster.run(arrivals))
    assert sum(cluster.meter.ended[i] == cluster.meter.ended[i] for i in range(requests)) == requests
    return count / requests


@pytest.mark.parametrize("full", [name for name in cases() if not name.startswith("schedule=")])
def test_a_simulated_request_costs_the_same_however_many_there_are(full: str) -> None:
    """Routers, placements and costs, of 4 engines; a schedule's own part is above."""
    given = cases()[full]
    given = {**given, "replicas": 4} if "replicas" in given else given
    few, many = per_request(80, given), per_request(400, given)
    assert many < 1.1 * few, (few, many)


def test_lateness_looks_at_those_who_may_be_late_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(max_model_len=400, max_num_seqs=8, max_rows=64, max_samples=8, max_waiting=10**6)
    engine = Engine(GROUPS, 400, limits, build_stack(["schedule=deadline(ttft_s=10.0)"]))
    chance = random.Random(2)
    for i in range(5000):
        engine.add(asked(i, chance), i / 1000)
    looked, real = [0], Lateness._late

    def counted(self: Lateness, *args: Any) -> Any:
        looked[0] += 1
        return real(self, *args)

    monkeypatch.setattr(Lateness, "_late", counted)
    plan, _ = engine.schedule(6.0)
    engine.commit(6.5, plan, facts(plan))  # half a second for 64 rows: prompts of 100 take 0.78 s
    first = {e.id for e in engine._refuse(9.9)}
    # 0.78 s before they are due, the longest are late; few others were looked at.
    assert len(first) < looked[0] < 800
    assert max(first) < 800
    ids = {e.id for e in engine._refuse(12.0)}
    late = {r.id: r for r in engine.requests() if r.id not in ids | first}
    assert len(ids | first) > 1900
    waiting = [r for r in late.values() if r.rid in engine.scheduler.waiting]
    for r in waiting:  # nobody is left who is sure to be late, whatever the prefix index has of it
        assert r.arrival + 10.0 >= 12.0
