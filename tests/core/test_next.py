"""The row of the next token, planned on its own short way, is what the way of all rows plans, in storms."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from tests.core.machine import Layered, Machine, PrefillFirst
from tests.core.storms import storm
from weft.core.planning import Planning
from weft.core.request import Request
from weft.core.scheduler import Scheduler
from weft.schedule.fcfs import FCFS
from weft.slots import Quota, RequestView, StepView

SEEDS = 12


def taken(d: Planning) -> dict[str, Any]:
    """What a plan in the making holds by now."""
    return {f.name: copy.copy(getattr(d, f.name)) for f in fields(d)}


def put_back(d: Planning, before: dict[str, Any]) -> None:
    """In the same view, which the scheduler holds too."""
    view = d.view
    for name, value in before.items():
        setattr(d, name, value)
    for f in fields(view):
        setattr(view, f.name, getattr(before["view"], f.name))
    d.view = view


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Every row that went the short way is taken back and planned the long one; how many went which."""
    seen, short = Counter[str](), Scheduler._next

    def both(scheduler: Scheduler, r: Request, d: Planning) -> bool:
        before, planned, refs = taken(d), list(r.planned), list(scheduler.pool.refs)
        found = short(scheduler, r, d)
        seen["short" if found else "long"] += 1
        if not found:
            assert (before, planned) == (taken(d), r.planned)
            return False
        after, behind = taken(d), list(r.planned)
        put_back(d, before)
        r.planned[:] = planned
        scheduler._target(r, d)
        assert (taken(d), r.planned) == (after, behind)
        seen["nothing"] += behind == planned
        assert refs == scheduler.pool.refs or scheduler.kv.sliding[0]
        return True

    monkeypatch.setattr(Scheduler, "_next", both)
    return seen


def test_who_gets_no_row_waits(compared: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule that lets one sequence of each step go on."""

    def quota(policy: FCFS, request: RequestView, step: StepView) -> Quota:
        return Quota(0 if step.decode_rows else step.rows_left)

    monkeypatch.setattr(FCFS, "quota", quota)
    for seed in range(SEEDS):
        storm(Machine, seed, 120)
    assert compared["nothing"] > 100


def test_a_schedule_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each sequence in a step: some schedules count what they grant."""
    asked, real = Counter[tuple[int, int]](), FCFS.quota
    views: list[StepView] = []

    def quota(policy: FCFS, request: RequestView, step: StepView) -> Quota:
        if not views or views[-1] is not step:
            views.append(step)
        asked[len(views), request.rid] += 1
        return real(policy, request, step)

    monkeypatch.setattr(FCFS, "quota", quota)
    for seed in range(SEEDS):
        storm(Machine, seed, 120)
    assert len(asked) > 1000
    assert max(asked.values()) == 1


@pytest.mark.parametrize(
    ("machine", "fixed"),
    [
        (Machine, {}),
        (Machine, {"below": 6, "cut": False}),
        (Machine, {"flights": 2, "rows": 4}),
        (PrefillFirst, {}),
        (Layered, {}),
    ],
    ids=["any", "tiers", "little", "prompts first", "layers"],
)
def test_the_short_way_plans_what_the_long_one_does(
    compared: Counter[str], machine: Callable[..., Any], fixed: dict[str, Any]
) -> None:
    for seed in range(SEEDS):
        storm(machine, seed, 120, **fixed)
    assert compared["long"] > 100
    if machine is Layered:
        assert not compared["short"]
    else:
        assert compared["short"] > 100
