"""Placements whose roles change, and phases beside each other: each rule by hand, and each at work on a small load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest

from weft.errors import ConfigError
from weft.place.accellm import AcceLLM
from weft.place.epd import EPD
from weft.place.nexus import Nexus
from weft.place.semipd import SemiPD
from weft.place.tetriinfer import TetriInfer
from weft.registry import names
from weft.sim.beside import SATURATION, Couples, Pair, portion
from weft.sim.kinds import cluster_of
from weft.sim.machines import encoder, hardware
from weft.sim.metrics import slo
from weft.sim.placement import splits
from weft.sim.pools import Pools
from weft.sim.run import Wanted, load, setting
from weft.sim.workload import UNIQUE, Arrival
from weft.slots.cost import Load
from weft.slots.place import Phase, Role, Share

BASE = Wanted(trace="poisson(rate=9, requests=60, prompt=2000, output=40)", replicas=4, slo=slo("ttft=1s,tpot=50ms"))
IMAGES = replace(BASE, trace="poisson(rate=3, requests=40, prompt=1200, output=40, images=4)")


@dataclass
class View:
    """A replica, or a couple with one for each phase, as a placement sees it."""

    running: int = 0
    waiting: int = 0
    pending: int = 0
    used: float = 0.0


@dataclass
class Two:
    prompts: View
    answers: View
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    idle: tuple[Phase, ...] = ()

    def work(self, phase: Phase) -> View:
        return self.prompts if phase == "prefill" else self.answers

    def busy(self, phase: Phase) -> bool:
        return phase not in self.idle

    def predict(self, phase: Phase, compute: float, *, alone: bool = False) -> float:
        return (0.1 if phase == "prefill" else 0.01) / compute


def crowd() -> list[Arrival]:
    """Long prompts with short answers, then short prompts with long answers."""
    heavy = [Arrival(i / 16, ((UNIQUE + i, 3000),), 4) for i in range(80)]
    light = [Arrival(5 + i / 40, ((2 * UNIQUE + i, 64),), 200) for i in range(160)]
    return sorted(heavy + light, key=lambda a: a.time_s)


def run(policy: str, arrivals: Sequence[Arrival], **changes: Any) -> Any:
    cluster = cluster_of(setting(replace(BASE, policy=policy, **changes)), log=True)
    cluster.run(arrivals)
    for replica in cluster.replicas:
        replica.engine.check()
    return cluster


@pytest.mark.parametrize("wanted", [BASE, IMAGES], ids=["text", "images"])
@pytest.mark.parametrize("name", names("place"))
def test_everybody_ends_and_every_token_is_said_once(name: str, wanted: Wanted) -> None:
    arrivals = list(load(wanted))
    cluster = run(name, arrivals)
    assert isinstance(cluster, Pools)
    meter, result = cluster.meter, cluster.result()
    assert result["finished"] == len(arrivals)
    assert sum(r.engine.stats.generation_tokens for r in cluster.replicas) == sum(a.output for a in arrivals)
    assert all(a.time_s < first <= end for a, first, end in zip(arrivals, meter.first, meter.ended, strict=True))
    assert not cluster.sent
    assert not cluster._asked
    assert not cluster._where
    acts = getattr(cluster, "rule", cluster.place).acts
    assert acts.get("handed_over", acts.get("entered", 0)) > 0
    again = run(name, arrivals)
    assert again.logs == cluster.logs


def test_no_two_placements_decide_alike() -> None:
    logs = [run(name, crowd()).logs for name in (*names("place"), "fcfs")]
    for i, one in enumerate(logs):
        assert all(one != other for other in logs[i + 1 :])


def test_nothing_is_taken_in_before_it_was_there() -> None:
    """Steps of a replica that hands over and takes in at once begin when what they hold has come."""
    cluster = run("tetriinfer(prefill=1, rows=2000, seqs=4, pause_s=0.1)", crowd())
    for log in cluster.logs:
        assert all(a[1] < b[1] for a, b in pairwise(log))
    meter, arrivals = cluster.meter, crowd()
    for a, first, end in zip(arrivals, meter.first, meter.ended, strict=True):
        # The second token is a hand-over and a step away from the first.
        assert end - first > cluster.transfer_s(a.prompt) + (a.output - 1) * 2e-3


# ------------------------------------------------------------------ TetriInfer


def test_an_instance_changes_sides_where_work_waits() -> None:
    place = TetriInfer(prefill=1, rows=1000, seqs=10, pause_s=1.0)
    roles: Sequence[Role] = place.roles(3)
    assert roles == ["prefill", "decode", "decode"]
    assert place.review([View(pending=1000), View(running=5), View(running=3)], roles, 0.0) == roles
    roles = place.review([View(pending=1001), View(running=5), View(running=3)], roles, 0.0)
    assert roles == ["prefill", "decode", "prefill"]
    calm = [View(pending=200), View(running=11), View(pending=0)]
    assert place.review(calm, roles, 0.5) == roles  # too soon after the last change
    assert place.review(calm, roles, 1.0) == ["prefill", "decode", "decode"]
    assert place.acts["flipped"] == 2
    # The last instance of a side stays there.
    assert place.review([View(pending=9999), View()], ["prefill", "decode"], 9.0) == ["prefill", "decode"]


def test_roles_that_follow_the_load_do_not_leave_prompts_to_one_instance() -> None:
    """Two and a half thousand rows a request come faster than one instance computes them; a second one helps out."""
    changing, fixed = run("tetriinfer(prefill=1, rows=3000, seqs=16, pause_s=0.5)", crowd()), run("distserve", crowd())
    assert changing.place.acts["flipped"] > 1
    assert changing.result()["ttft_s"]["mean"] < 0.7 * fixed.result()["ttft_s"]["mean"]


# ------------------------------------------------------------------ EPD


def test_tiles_go_to_the_encoder_that_is_free_first() -> None:
    cluster = cluster_of(setting(replace(BASE, policy="epd(encode=2, prefill=1)")))
    assert isinstance(cluster, Pools)
    tile_s, h = cluster.setting.image_s, hardware("h100")
    vit = encoder("internvit-6b")
    assert tile_s == pytest.approx((2 * 5.54e9 * 1025 + 4 * 45 * 3200 * 1025**2) / (989.4e12 * 0.65))
    sent_s = h.link.latency_s + 3 * vit.tokens * 4096 * 2 / h.link.bytes_s
    one = Arrival(1.0, ((UNIQUE, 900),), 2, images=3)
    assert cluster.encode(one, 1.0) == pytest.approx(1.0 + 2 * tile_s + sent_s)  # two tiles on one, one on the other
    assert cluster.encode(replace(one, images=1), 1.0) == pytest.approx(1.0 + 2 * tile_s + sent_s / 3, abs=1e-4)


def test_images_beside_answers_hold_these_up_and_apart_they_do_not() -> None:
    arrivals = list(load(replace(IMAGES, trace="poisson(rate=9, requests=120, prompt=1200, output=150, images=4)")))
    inline, apart = run("least_loaded", arrivals).result(), run("epd(encode=1, prefill=1)", arrivals).result()
    assert apart["tpot_s"]["p99"] < 0.9 * inline["tpot_s"]["p99"]


def test_encoders_help_out_and_come_back() -> None:
    place = EPD(encode=2, prefill=1, rows=1000)
    roles = place.roles(4)
    assert roles == ["encode", "encode", "prefill", "decode"]
    roles = place.review([View(pending=5), View(), View(pending=1001), View()], roles, 0.0)
    assert roles == ["encode", "prefill", "prefill", "decode"]
    assert place.review([View(pending=1001), View(), View(), View()], roles, 9.0) == [
        "encode",
        "encode",
        "prefill",
        "decode",
    ]


def test_numbers_of_encoders_are_searched_as_those_of_prefill_instances_are() -> None:
    found = splits(replace(IMAGES, slo=slo("ttft=1s,tpot=50ms")), "epd", list(load(IMAGES))[:20])
    assert {s.policy for s in found} == {f"fcfs+epd(prefill={p}, encode={e})" for e, p in ((1, 1), (1, 2), (2, 1))}
    assert found == sorted(found, key=lambda s: -s.result["goodput"])


# ------------------------------------------------------------------ AcceLLM


def test_a_pair_answers_with_both_devices_while_no_prompt_is_there() -> None:
    place = AcceLLM()
    both, one = Two(View(), View(running=8), idle=("prefill",)), Two(View(pending=9), View(running=8))
    assert place.share("decode", both, 0, 0.0) == Share(ways=2)
    assert place.share("decode", one, 0, 0.0) == place.share("prefill", one, 0, 0.0) == Share()
    assert place.enter(100, [one, Two(View(), View(running=7))], 0.0) == 1
    half = portion(Load(rows=7, samples=7, works=7, prompt_pairs=[0.0], prompt_entries=[0.0], decode_entries=[90.0]), 2)
    assert (half.rows, half.samples, half.works, half.decode_entries) == (4, 4, 4, [45.0])
    with pytest.raises(ConfigError, match="pairs"):
        run("accellm", [], replicas=3)


def test_a_step_of_both_devices_takes_half_the_entries_and_all_weights() -> None:
    arrivals = [Arrival(0.0, ((UNIQUE + i, 1000),), 50) for i in range(2)]
    pair, alone = run("accellm", arrivals, replicas=2), run("fcfs", arrivals, replicas=1)
    gap = alone.result()["tpot_s"]["mean"] - pair.result()["tpot_s"]["mean"]
    # Each step has one sequence less: some 1,025 entries of 128 KiB, and the 2 us of the host for it.
    assert gap == pytest.approx(1025 * 131072 / (3350e9 * 0.8) + 2e-6, rel=0.1)


# ------------------------------------------------------------------ phases on one device


def test_two_streams_share_a_memory_as_it_is_said() -> None:
    pair = Pair(setting(replace(BASE, policy="nexus")), apart=False)

    @dataclass
    class Worker:
        stepping: bool

    pair.workers = {"prefill": Worker(True), "decode": Worker(True)}  # type: ignore[dict-item]
    pair.draws = {"prefill": 0.3, "decode": 0.9}
    assert pair.bandwidth("decode", 0.9, alone=False) == pytest.approx(0.7)  # what the prompt's step leaves
    assert pair.bandwidth("prefill", 0.9, alone=False) == 0.5  # at least half
    assert pair.bandwidth("decode", 0.11, alone=False) == pytest.approx(0.11 / SATURATION)
    assert pair.bandwidth("decode", 1.0, alone=True) == 1.0
    step = Load(rows=2048, works=1, prompt_pairs=[0.0], prompt_entries=[0.0], decode_entries=[0.0])
    whole, half = (pair.parts("prefill", step, c, alone=True) for c in (1.0, 0.5))
    assert half.weights == pytest.approx(2 * whole.weights)  # products of many rows go by the units
    few = replace(step, rows=1)
    whole, half = (pair.parts("decode", few, c, alone=True) for c in (1.0, 0.75))
    assert half.weights == pytest.approx(whole.weights)  # reading weights does not, from SATURATION on


def test_semi_pd_shifts_towards_the_limit_that_is_missed_by_more() -> None:
    place = SemiPD(split=0.5, step=0.1, ttft_s=1.0, tpot_s=0.1, every_s=1.0)
    couple = Two(View(), View(), ttft_s=0.9, tpot_s=0.09)
    assert place.share("prefill", couple, 0, 0.0).compute == 0.5
    assert place.share("prefill", couple, 0, 1.0).compute == 0.5  # both are kept
    couple.ttft_s = 2.0
    assert place.share("prefill", couple, 0, 1.5).compute == 0.5  # too soon
    assert place.share("prefill", couple, 0, 2.0).compute == pytest.approx(0.6)
    couple.tpot_s = 0.3
    assert place.share("decode", couple, 0, 3.0).compute == pytest.approx(0.5)
    assert place.acts["shifted"] == 2


def test_nexus_gives_prompts_what_answers_can_spare() -> None:
    place = Nexus(slack=0.5, full=0.8, least=0.15, every=2)
    couple = Two(View(), View())
    # 0.01 / (1 - x) <= 1.5 * 0.01 up to x = 1/3.
    assert place.share("prefill", couple, 0, 0.0).compute == pytest.approx(0.3)
    couple.answers.used = 0.9  # 0.1 / x <= 1.5 * 0.1 from x = 2/3 on: the least such share for prompts
    assert place.share("decode", couple, 0, 0.0).compute == pytest.approx(0.7)  # planned every second step
    assert place.share("decode", couple, 0, 0.0).compute == pytest.approx(0.3)
    couple.idle = ("prefill",)
    assert place.share("decode", couple, 0, 0.0) == Share()


@pytest.mark.parametrize("policy", ["semipd", "nexus"])
def test_answers_go_on_while_a_long_prompt_is_computed(policy: str) -> None:
    """One that answers, and a prompt of 30,000 tokens: chunks of it hold up every token, a share of the device does not."""
    arrivals = [Arrival(0.0, ((UNIQUE, 200),), 300), Arrival(0.5, ((UNIQUE + 1, 30_000),), 2)]
    beside, chunked = (run(p, arrivals, replicas=1).meter for p in (policy, "fcfs"))
    assert beside.ended[0] - beside.first[0] < 0.9 * (chunked.ended[0] - chunked.first[0])
    assert beside.first[1] > chunked.first[1]  # and that is what it costs
    assert all(math.isfinite(t) for t in beside.ended)


def test_a_pool_is_never_more_than_the_device_has() -> None:
    for policy, each in (("nexus", 1), ("accellm", 2)):
        cluster = cluster_of(setting(replace(BASE, policy=policy)))
        assert isinstance(cluster, Couples)
        assert len(cluster.replicas) == 2 * (4 // each)
        for c in range(4 // each):
            total = sum(r.engine.pool.total for r in cluster.replicas[2 * c : 2 * c + 2])
            assert total <= cluster.setting.kv_blocks() + 1
