"""Prompts on some replicas, answers on others: what is handed over, how long that takes, and who wins when."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from weft.cli.app import app
from weft.errors import ConfigError
from weft.sim.kinds import cluster_of
from weft.sim.metrics import slo
from weft.sim.placement import splits
from weft.sim.pools import Pools
from weft.sim.run import Wanted, load, run, setting
from weft.sim.workload import UNIQUE, Arrival

BASE = Wanted(trace="poisson(rate=9, requests=120, prompt=2000, output=60)", replicas=3, slo=slo("ttft=1s,tpot=50ms"))


def wanted(policy: str, **changes: object) -> Wanted:
    from dataclasses import replace

    return replace(BASE, policy=policy, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["distserve(prefill=1)", "distserve(prefill=2)", "splitwise(prefill=1, mixed=1)"])
def test_everybody_ends_and_prompts_are_computed_once(policy: str) -> None:
    cluster = cluster_of(setting(wanted(policy)))
    assert isinstance(cluster, Pools)
    meter = cluster.run(load(BASE))
    assert cluster.result()["finished"] == 120
    decoded = 0
    for replica, role in zip(cluster.replicas, cluster.roles, strict=True):
        replica.engine.check()
        stats = replica.engine.stats
        if role == "prefill":
            assert stats.generation_tokens == stats.finished > 0
        elif role == "decode":
            decoded += stats.finished
            # Of each prompt the rows of the last block that is not full are computed again, and no others.
            assert 0 < stats.prompt_tokens <= 16 * stats.finished
            assert stats.prefix_hit_tokens > 100 * stats.finished
    assert decoded > 0
    assert meter.cached > 0
    assert not cluster.sent
    assert not cluster._asked


def test_a_hand_over_takes_the_time_of_its_bytes() -> None:
    one = [Arrival(0.0, ((UNIQUE, 1024),), 4)]
    cluster = cluster_of(setting(wanted("distserve(prefill=1)", replicas=2)))
    assert isinstance(cluster, Pools)
    cluster.run(one)
    meter = cluster.meter
    on_the_way = 5e-6 + 1024 * 131072 / 450e9  # entries of 128 KiB over nvlink4
    assert cluster.transfer_s(1024) == pytest.approx(on_the_way)
    alone = cluster_of(setting(wanted("fcfs", replicas=1)))
    alone.run(one)
    assert meter.first[0] == pytest.approx(alone.meter.first[0])
    # Three more tokens: the hand-over beside three steps, of which the first has one row more to compute.
    assert meter.ended[0] - alone.meter.ended[0] == pytest.approx(on_the_way, rel=0.15)
    hidden = cluster_of(setting(wanted("splitwise(prefill=1, mixed=0)", replicas=2)))
    assert isinstance(hidden, Pools)
    assert hidden.transfer_s(1024) == pytest.approx(5e-6 + (on_the_way - 5e-6) / 32)


def test_answers_come_evenly_where_no_prompt_is_beside_them() -> None:
    """The claim of disaggregation: the slowest gap between tokens is shorter; what it costs is fewer devices for prompts."""
    apart, _ = run(wanted("distserve(prefill=1)"))
    together, _ = run(wanted("least_loaded"))
    assert apart["tpot_s"]["p99"] < 0.8 * together["tpot_s"]["p99"]
    assert apart["ttft_s"]["p99"] > together["ttft_s"]["p99"]


def test_an_overflow_goes_to_the_mixed_pool() -> None:
    cluster = cluster_of(setting(wanted("splitwise(prefill=1, mixed=1, queue=2500)")))
    assert isinstance(cluster, Pools)
    cluster.run(load(BASE))
    assert cluster.place.acts["mixed"] > 0  # type: ignore[attr-defined]
    assert cluster.replicas[1].engine.stats.finished == cluster.place.acts["mixed"]  # type: ignore[attr-defined]


def test_the_best_proportion_is_found() -> None:
    arrivals = list(load(BASE))
    found = splits(wanted("fcfs", slo=slo("ttft=300ms,tpot=50ms")), "distserve", arrivals)
    assert [s.result["goodput"] for s in found] == sorted((s.result["goodput"] for s in found), reverse=True)
    assert {s.policy for s in found} == {"fcfs+distserve(prefill=1)", "fcfs+distserve(prefill=2)"}


def test_the_best_proportion_is_found_by_the_command() -> None:
    args = ["sim", "--trace", BASE.trace, "--slo", "ttft=300ms,tpot=50ms", "--json"]
    done = CliRunner().invoke(app, [*args, "--proportions", "distserve", "--replicas", "4"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {t["policy"] for t in told} == {f"fcfs+distserve(prefill={n})" for n in (1, 2, 3)}
    goodput = [t["goodput"] for t in told]
    assert goodput == sorted(goodput, reverse=True)
    assert goodput[0] > goodput[-1]
    # Two paces, beside another policy: the best of each pace stands first of it.
    more = ["--proportions", "splitwise", "--replicas", "3", "--compare", "fcfs+least_loaded", "--rates", "1,2"]
    told = json.loads(CliRunner().invoke(app, [*args, *more]).stdout)
    assert [t["rate"] for t in told] == sorted(t["rate"] for t in told)
    assert len(told) % 2 == 0
    assert "fcfs+least_loaded" in {t["policy"] for t in told}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--proportions", "fcfs"], "there is no place=fcfs"),
        (["--proportions", "semipd"], "no number of replicas is set aside for prompts; it is under: distserve"),
        (["--proportions", "distserve"], "at least 2 replicas, got 1"),
        (["--proportions", "epd", "--replicas", "2"], "epd needs more than 2 replicas"),
        (["--proportions", "distserve", "--replicas", "3", "--policy", "fcfs+round_robin"], "leave out route=round_robin"),
    ],
)  # fmt: skip
def test_what_has_no_proportions_is_refused(given: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["sim", "--trace", BASE.trace, *given])
    assert done.exit_code == 2, done.output
    assert says in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("policy", "replicas", "share"),
    [("distserve(prefill=3)", 3, True), ("splitwise(prefill=1, mixed=2)", 3, True), ("distserve(prefill=1)", 3, False),
     ("distserve+round_robin", 3, True), ("distserve(prefill=0)", 3, True)],
)  # fmt: skip
def test_what_cannot_be_placed_is_refused(policy: str, replicas: int, share: bool) -> None:
    with pytest.raises(ConfigError):
        cluster_of(setting(wanted(policy, replicas=replicas, share=share)))


def test_the_same_with_and_without_runs_of_decode_steps() -> None:
    one, _ = run(wanted("distserve(prefill=1)"))
    two, _ = run(wanted("distserve(prefill=1)", coasting=False))
    assert one == two
