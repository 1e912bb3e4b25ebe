"""Placements whose roles change, and phases beside each other: each rule by hand, and each at work on a small load."""

from __future__ import annotations

import math
import random
from collections import Counter
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
from weft.slots.place import Handed, Phase, Role, Share

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


def test_answers_are_spread_by_the_length_that_is_predicted_of_them() -> None:
    """Buckets of 200 tokens, heavy above 128: 390 counts as 200 and is heavy, 150 counts as 0 and is light."""
    place = TetriInfer(accuracy=1.0)
    assert [place.predict(n, 0.5, True) for n in (0, 199, 200, 390)] == [0, 0, 200, 200]
    roles: Sequence[Role] = ["prefill", "decode", "decode"]
    views = [View(), View(), View()]

    def give(id: int, prompt: int, answer: int, room: int = 10_000) -> int:
        return place.handoff(Handed(id, prompt, answer, room), views, roles, 0.0)

    assert give(0, 100, 390) == 1  # nobody has anything: the first
    assert give(1, 2000, 390) == 2  # all of what 1 has is heavy
    assert give(2, 2500, 150) == 1  # light, and 1 holds 300 of 2,200
    # 1 has one heavy answer of two, 2 has nothing else: a heavy one goes to 1 although 2 holds less, 2,200 of 2,800.
    assert give(3, 3000, 900) == 1
    # 1 holds 100 + 200 + 2,500 + 3,000 + 800, and 2 2,200: for 6,000 more only 2 has room, heavy as it is.
    assert give(4, 5800, 390) == 2
    place.ended(4)
    place.ended(1)
    assert give(5, 10, 150) == 2  # which has nothing any more
    assert give(6, 20_000, 0) == 2  # no room anywhere: where least is held


def test_a_prediction_misses_by_one_bucket_as_often_as_it_is_said_to() -> None:
    place, roles = TetriInfer(accuracy=0.75, bucket=100), ["prefill", "decode", "decode"]
    for id in range(2000):
        place.handoff(Handed(id, 1, 250, 10**9), [View()] * 3, roles, 0.0)  # type: ignore[arg-type]
    assert place.acts["misread"] == pytest.approx(500, abs=60)
    held = Counter(holds - 1 for _, holds, _ in place._there.values())
    assert set(held) == {100, 200, 300}
    assert held[100] == pytest.approx(held[300], rel=0.3)
    with pytest.raises(ValueError, match="accuracy"):
        TetriInfer(accuracy=1.5)


def test_heavy_answers_are_balanced_better_where_lengths_are_known() -> None:
    """Two kinds of answers, three instances: the largest difference in entries that instances hold."""

    def spread(place: TetriInfer) -> float:
        chance, apart = random.Random(5), []
        roles: Sequence[Role] = ["prefill", *["decode"] * 4]
        held: Counter[int] = Counter()
        for id in range(800):
            answer = 1000 if chance.random() < 0.2 else 50
            held[place.handoff(Handed(id, 100, answer, 10**9), [View()] * 5, roles, 0.0)] += 100 + answer
            apart.append(max(held[i] for i in range(1, 5)) - min(held[i] for i in range(1, 5)))
        return sum(apart) / len(apart)

    known, unknown = spread(TetriInfer(accuracy=1.0)), spread(TetriInfer(accuracy=1.0, bucket=10_000))
    assert known < 0.7 * unknown  # the paper's bar: 30 % less imbalance


def test_roles_that_follow_the_load_do_not_leave_prompts_to_one_instance() -> None:
    """Two and a half thousand rows a request come faster than one instance computes them; a second one helps out."""
    changing, fixed = run("tetriinfer(prefill=1, rows=3000, seqs=16, pause_s=0.5)", crowd()), run("distserve", crowd())
    assert changing.place.acts["flipped"] > 1
    assert changing.result()["ttft_s"]["mean"] < 0.7 * fixed.result()["ttft_s"]["mean"]


# ------------------------------------------------------------------ EPD


@pytest.mark.parametrize("schedule", ["fcfs", "deadline(ttft_s=0.001)"])
def test_a_placement_is_told_of_requests_that_a_replica_refuses(schedule: str) -> None:
    """By a decode replica, whose pool could never hold the answer; by a prefill replica, as too late for its first token."""
    load = [Arrival(0.0, ((UNIQUE + i, 200),), 20 if i % 2 else 2000) for i in range(40)]
    cluster = run(f"tetriinfer(prefill=1)+{schedule}", load, replicas=3, blocks=80)  # 1,280 entries
    assert isinstance(cluster.place, TetriInfer)
    result = cluster.result()
    assert result["refused"] >= (20 if schedule == "fcfs" else 1)
    assert result["finished"] + result["refused"] == 40
    assert not cluster.place._there
    assert not any(cluster.place._holds.values())
    assert not any(cluster.place._kinds.values())
    assert not cluster._asked
    assert not cluster._where
    assert not cluster._prompts


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


def test_copies_of_who_came_last_are_dropped_first_where_memory_is_short() -> None:
    """Two devices of 6 blocks.  Sequences of 4, 3 and 2 leave 3: the second one's copy fits, and so does nobody's beside it."""
    place = AcceLLM()
    assert place.alone([4, 3, 2], 6) == [0, 2]
    assert place.alone([2, 2, 2], 6) == []  # all of it twice
    assert place.alone([3, 3, 3, 3], 6) == [0, 1, 2, 3]  # no room for any
    assert place.alone([1, 1, 4, 4], 6) == [2, 3]
    assert place.acts["dropped"] == 8


def test_who_has_one_copy_waits_while_its_device_computes_a_prompt() -> None:
    """Ten answers of some 115 blocks when a prompt comes, 718 blocks on each device: 286 are left, which is two copies.

    Of the other eight every second one waits for the prompt.  With more memory nobody does.
    """
    arrivals = [*(Arrival(0.0, ((UNIQUE + i, 1600),), 400) for i in range(10)), Arrival(2.0, ((2 * UNIQUE, 1600),), 2)]
    short, ample = (run("accellm", arrivals, replicas=2, blocks=n) for n in (820, 2500))
    assert short.replicas[1].engine.pool.total == 2 * 718
    prompt_s = short.meter.first[10] - 2.0
    assert [i for i in range(10) if short.meter.gaps.longest[i] > 1.1 * prompt_s] == [3, 5, 7, 9]
    assert max(ample.meter.gaps.longest) < 0.5 * prompt_s
    assert ample.rule.acts["dropped"] == 0 < short.rule.acts["dropped"]


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
            assert total <= each * cluster.setting.kv_blocks() + 1
