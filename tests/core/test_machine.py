"""The core as a state machine, driven by hypothesis and by storms of random events; see `tests.core.machine`."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.core.machine import Layered, Machine, PrefillFirst
from tests.core.storms import storm

MACHINES = pytest.mark.parametrize("machine", [Machine, PrefillFirst, Layered], ids=lambda m: m.policy.split("(")[0])
QUIET = list(HealthCheck)


@MACHINES
def test_any_order_of_events(machine: type[Machine]) -> None:
    profile = settings(
        max_examples=40,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=QUIET,
        derandomize=True,
        database=None,
    )
    run_state_machine_as_test(machine, settings=profile)


@pytest.mark.long
@pytest.mark.hours
@pytest.mark.timeout(3600)
@MACHINES
def test_any_order_of_events_for_long(machine: type[Machine]) -> None:
    """Other orders each time it is run."""
    profile = settings(max_examples=700, stateful_step_count=80, deadline=None, suppress_health_check=QUIET)
    run_state_machine_as_test(machine, settings=profile)


@MACHINES
def test_storm(machine: type[Machine]) -> None:
    seen = sum((storm(machine, seed, 120) for seed in range(9)), Counter[str]())
    wanted = "guesses accepted linked copies following overlapping kept short preemptions evictions hits saves loads lost".split()
    if machine is Layered:
        wanted.append("splits")
    assert not [name for name in wanted if not seen[name]], seen


@pytest.mark.long
@pytest.mark.timeout(3600)
@MACHINES
def test_storm_for_long(machine: type[Machine]) -> None:
    for seed in range(1000, 1400):
        storm(machine, seed, 300)
