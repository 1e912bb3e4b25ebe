"""Runs of decode steps that the simulator takes without planning them are, decision for decision, those that the engine plans."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from weft.config import Limits
from weft.cost.roofline import Roofline
from weft.registry import parse
from weft.sim import cluster
from weft.sim.cluster import Cluster, Setting
from weft.sim.coast import Coast
from weft.sim.machines import hardware, model
from weft.sim.replica import Replica
from weft.sim.workload import UNIQUE, Arrival
from weft.slots.cost import Figures, Hardware, Load, Parts, Price

MODEL = model("llama-3.2-1b", block_tokens=4)
SCHEDULES = [
    "schedule=fcfs", "schedule=prefill_first", "schedule=layered(least=8)", "schedule=deadline(ttft_s=3.0, row_s=0.004)",
]  # fmt: skip


def crowd(seed: int, n: int = 60, pace: float = 300.0) -> Iterator[Arrival]:
    """Bursts, shared prefixes, priorities, tenants, and answers of 1 to 120 tokens."""
    chance, now = random.Random(seed), 0.0
    for i in range(n):
        now += chance.expovariate(pace) if chance.random() < 0.9 else 0.05
        head = ((chance.randrange(1, 4), chance.randrange(1, 40)),) if chance.random() < 0.5 else ()
        yield Arrival(
            now, (*head, (UNIQUE + i, chance.randrange(1, 60))), chance.choice([1, 2, 7, 30, 120]),
            f"t{chance.randrange(3)}", chance.randrange(2),
        )  # fmt: skip


def simulated(
    seed: int, *, coasting: bool, blocks: int, schedule: str, route: str = "round_robin", replicas: int = 1
) -> Cluster:
    limits = Limits(max_model_len=400, max_num_seqs=12, max_rows=48, max_samples=12)
    setting = Setting(
        model=MODEL, hardware=hardware("cpu2"), cost=Roofline(dtype="float32", host_s=1e-5), parts=[parse(schedule)],
        route=parse(f"route={route}"), replicas=replicas, limits=limits, blocks=blocks, coasting=coasting,
    )  # fmt: skip
    made = Cluster(setting, log=True)
    made.run(crowd(seed))
    return made


@pytest.mark.parametrize("blocks", [60, 90, 400])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_log_is_that_of_single_steps(schedule: str, blocks: int) -> None:
    coasted = preempted = evicted = shared = refused = 0
    for seed in range(4):
        whole = simulated(seed, coasting=True, blocks=blocks, schedule=schedule)
        single = simulated(seed, coasting=False, blocks=blocks, schedule=schedule)
        for a, b in zip(whole.logs[0], single.logs[0], strict=True):
            assert a == b
        assert whole.result() == single.result()
        assert whole.meter.gaps.longest == single.meter.gaps.longest
        engine = whole.replicas[0].engine
        engine.check()
        coasted += whole.replicas[0]._coast.steps
        preempted += whole.meter.preemptions
        evicted += engine.pool.evictions
        shared += whole.meter.cached
        refused += whole.meter.refusals
        assert whole.result()["finished"] + whole.result()["refused"] == whole.result()["requests"]
        assert single.replicas[0]._coast.steps == 0
    assert coasted > 100
    assert shared > 0
    assert (refused > 0) == schedule.startswith("schedule=deadline")
    if blocks == 60 and not refused:
        assert preempted > 0
        assert evicted > 0


@pytest.mark.parametrize("route", ["round_robin", "least_loaded", "power_of_two", "prefix_aware"])
def test_routers_see_the_same_and_choose_the_same(route: str) -> None:
    args = {"blocks": 90, "schedule": "schedule=fcfs", "route": route, "replicas": 3}
    whole, single = simulated(5, coasting=True, **args), simulated(5, coasting=False, **args)  # type: ignore[arg-type]
    assert whole.logs == single.logs
    assert whole.result() == single.result()
    assert sum(r._coast.steps for r in whole.replicas) > 100


class Asks:
    """A replica as a router would see it by bringing it to the moment of each request and counting anew."""

    def __init__(self, replica: Replica, clock: list[float]) -> None:
        self.replica, self.clock = replica, clock

    def __getattr__(self, name: str) -> float:
        self.replica.quiet = 0.0
        self.replica.advance(self.clock[0])
        return getattr(self.replica, name)  # type: ignore[no-any-return]


@pytest.mark.parametrize("coasting", [True, False])
@pytest.mark.parametrize("route", ["least_loaded", "power_of_two", "prefix_aware"])
def test_a_replica_within_a_step_is_left_alone_and_nothing_else_is_seen(
    route: str, coasting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {"coasting": coasting, "blocks": 90, "schedule": "schedule=fcfs", "route": route, "replicas": 3}
    priced, real = [0], Roofline.on

    def counted(self: Roofline, hardware: Hardware, figures: Figures) -> Price:
        price = real(self, hardware, figures)

        def one(load: Load) -> Parts:
            priced[0] += 1
            return price(load)

        return one

    monkeypatch.setattr(Roofline, "on", counted)
    quick = simulated(5, **args)  # type: ignore[arg-type]
    assert priced[0] == quick.meter.steps  # each step once, however many requests come while it runs
    monkeypatch.setattr(cluster, "Look", Asks)
    slow = simulated(5, **args)  # type: ignore[arg-type]
    assert quick.logs == slow.logs
    assert quick.result() == slow.result()
    assert quick.meter.parts == slow.meter.parts  # sums in the same order, to the last bit


@pytest.mark.parametrize("broken", ["_grow", "_settle"])
def test_a_run_that_forgets_something_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a new block, or without publishing one, the logs differ (or the books do not balance)."""
    if broken == "_grow":
        real = Coast._grow
        monkeypatch.setattr(Coast, "_grow", lambda self, grow, at: real(self, grow[::-1], at))
    else:
        monkeypatch.setattr(
            Coast, "_settle", lambda self, fill, ends, now, real=Coast._settle: real(self, [], ends, now)
        )
    different = False
    for seed in range(4):
        whole = simulated(seed, coasting=True, blocks=60, schedule="schedule=fcfs")
        single = simulated(seed, coasting=False, blocks=60, schedule="schedule=fcfs")
        held = [sum(1 for key in c.replicas[0].engine.pool.keys if key is not None) for c in (whole, single)]
        different |= whole.logs != single.logs or held[0] != held[1]
    assert different
