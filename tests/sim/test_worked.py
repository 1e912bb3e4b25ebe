"""Placements, routers and costs on an example each, worked by hand: who computes which rows, and that first come, first served
decides otherwise on the same load.

Engines count the requests that come to them from 1.  Blocks have 16 tokens: of a prompt of 40 whose KV comes from elsewhere, the
8 rows behind the last whole block are computed again, and the first token's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from weft.registry import lookup, names
from weft.sim.kinds import cluster_of
from weft.sim.run import Wanted, setting
from weft.sim.workload import UNIQUE, Arrival

Steps = list[dict[int, int]]
"""The rows of every request in each step of an engine."""


def ask(at: float, i: int, prompt: int, output: int, *, like: int = 0, images: int = 0) -> Arrival:
    """like: of the prompt's first 256 tokens, which others may have as well; 0 for none of these."""
    segments = ((UNIQUE + i, prompt),) if not like else ((like, 256), (UNIQUE + i, prompt - 256))
    return Arrival(at, segments, output, images=images)


def logs(arrivals: Sequence[Arrival], policy: str, **given: Any) -> list[list[tuple[float, dict[int, int]]]]:
    """Of each engine, when every step begins and what is in it."""
    cluster = cluster_of(setting(Wanted(trace="", policy=policy, **given)), log=True)
    cluster.run(arrivals)
    return [[(e[1], {w[0]: w[2] for w in e[2]}) for e in log if e[2]] for log in cluster.logs]  # type: ignore[misc,attr-defined]


def decided(arrivals: Sequence[Arrival], policy: str, **given: Any) -> list[Steps]:
    return [[rows for _, rows in log] for log in logs(arrivals, policy, **given)]


TWO = [ask(0.0, 0, 40, 3), ask(0.001, 1, 60, 2)]
"""The second comes while the prompt of the first is computed."""
THREE = [ask(0.0, i, 40, 3) for i in range(3)]
PLACED: dict[str, tuple[str, int, list[Arrival], list[Steps]]] = {
    # One computes prompts alone, and the other one answers alone.
    "distserve": ("", 2, TWO, [[{1: 40}, {2: 60}], [{1: 9}, {1: 1}, {2: 13}]]),
    # 40 rows wait, and 40 more are above 60: the second and the third go to the mixed one, which keeps them.
    "splitwise": ("queue=60", 3, THREE, [[{1: 40}], [{1: 40, 2: 40}, {1: 1, 2: 1}, {1: 1, 2: 1}], [{1: 9}, {1: 1}]]),
    # 80 rows wait, which are above 50: an instance for answers computes the third prompt.
    "tetriinfer": ("rows=50, pause_s=0.0, accuracy=1.0", 3, THREE,
                   [[{1: 40, 2: 40}], [{1: 40}], [{1: 9}, {1: 1, 2: 9, 3: 9}, {2: 1, 3: 1}]]),
    # While the first one's images are encoded elsewhere, the text that came later goes before it.
    "epd": ("", 3, [ask(0.0, 0, 40, 2, images=2), ask(0.001, 1, 60, 2)], [[], [{1: 60}, {2: 40}], [{1: 13}, {2: 9}]]),
    # One device of a pair computes the second prompt, while the other one goes on with the first answer.  60 rows wait there when
    # the third comes: it goes to the other pair.
    "accellm": ("", 4, [*TWO, ask(0.002, 2, 20, 2)], [[{1: 40}, {2: 60}], [{1: 9}, {1: 1}, {2: 13}], [{1: 20}], [{1: 5}]]),
    # A worker computes the second prompt while another one answers, on the same device.
    "semipd": ("", 1, TWO, [[{1: 40}, {2: 60}], [{1: 9}, {1: 1, 2: 13}]]),
    "nexus": ("", 1, TWO, [[{1: 40}, {2: 60}], [{1: 9}, {1: 1, 2: 13}]]),
}  # fmt: skip


@pytest.mark.parametrize("name", names("place"))
def test_a_placement_by_hand(name: str) -> None:
    inside, replicas, arrivals, worked = PLACED[name]
    assert decided(arrivals, f"{name}({inside})", replicas=replicas) == worked
    for plain in ("fcfs", "fcfs+least_loaded"):
        together = decided(arrivals, plain, replicas=replicas)
        assert together != worked
        # Whoever computes a prompt answers: each request is one engine's.
        assert sum(len({i for step in steps for i in step}) for steps in together) == len(arrivals)


def test_first_come_first_served_has_the_second_prompt_beside_the_first_answer() -> None:
    """What placements on one device are for."""
    assert decided(TWO, "fcfs") == [[{1: 40}, {1: 1, 2: 60}, {1: 1, 2: 1}]]


def test_shares_of_a_device_are_semi_pd_s_own_and_nexus_gives_who_is_alone_everything() -> None:
    """A prompt of 4,000 rows alone: arithmetic takes 1 / 0.5 of what it takes the whole device, or the same."""
    one = [ask(0.0, 0, 4000, 2)]

    def answered(policy: str) -> float:
        return min(log[-1][0] for log in logs(one, policy, max_rows=4096) if len(log) == 1 and log[-1][0] > 0)

    whole = logs(one, "fcfs", max_rows=4096)[0][1][0] - 2e-3
    assert answered("semipd(split=0.5)") - 2e-3 == pytest.approx(2 * whole, rel=0.02)
    assert answered("nexus") - 2e-3 == pytest.approx(whole, rel=0.02)


ROUTED: dict[str, tuple[list[Arrival], list[Steps], list[Steps]]] = {
    # In turns, however long the prompts are; one engine would have all of them in its steps.
    "round_robin": ([ask(0.0, 0, 300, 1), ask(0.0, 1, 40, 1), ask(0.0, 2, 50, 1)], [[{1: 300, 2: 50}], [{1: 40}]],
                    [[{1: 300, 2: 40, 3: 50}]]),
    # 300 rows and a sequence are 428, 40 and a sequence 168.
    "least_loaded": ([ask(0.0, 0, 300, 1), ask(0.0, 1, 40, 1), ask(0.0, 2, 50, 1)], [[{1: 300}], [{1: 40, 2: 50}]],
                     [[{1: 300, 2: 50}], [{1: 40}]]),
    # Of two engines both are drawn: the second finds nobody at the other one, and so does the third, 90 ms later.
    "power_of_two": ([ask(0.0, 0, 40, 20), ask(0.001, 1, 50, 1), ask(0.09, 2, 60, 1)],
                     [[{1: 40}, *[{1: 1}] * 19], [{1: 50}, {2: 60}]],
                     [[{1: 40}, *[{1: 1}] * 11, {1: 1, 2: 60}, *[{1: 1}] * 7], [{1: 50}]]),
    # The second's beginning of 256 tokens is on the second engine, where 44 rows of the third are left.
    "prefix_aware": ([ask(0.0, 0, 300, 1, like=1), ask(0.0, 1, 300, 1, like=2), ask(1.0, 2, 300, 1, like=2)],
                     [[{1: 300}], [{1: 300}, {2: 44}]], [[{1: 300}, {2: 300}], [{1: 300}]]),
}  # fmt: skip


@pytest.mark.parametrize("name", names("route"))
def test_a_router_by_hand(name: str) -> None:
    """Beside first come, first served in turns; for those turns themselves, on one engine."""
    arrivals, worked, plain = ROUTED[name]
    assert decided(arrivals, f"fcfs+{name}", replicas=2) == worked
    assert decided(arrivals, "fcfs", replicas=len(plain)) == plain != worked


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """A load, and the time of one of its steps as a share of what the roofline says of it on the same devices."""

    inside: str = ""
    given: dict[str, Any] = field(default_factory=dict)
    load: list[Arrival]
    step: int = 0
    share: tuple[float, float]


PROMPT = [ask(0.0, 0, 30_000, 3)]
FOUR = [ask(0.0, i, 4000, 3) for i in range(4)]
MANY = [ask(0.0, i, 2000, 5) for i in range(100)]
MIXED = [ask(0.0, i, 2000, 150) for i in range(100)]
WHOLE = {"max_rows": 1 << 18, "max_num_seqs": 512}
CHUNKS = {"max_rows": 2048, "max_num_seqs": 512}
RANKS = {"max_rows": 32_768}
PRICES: dict[str, Priced] = {
    # Half of the rows and of their attention each, beside which what passes around the ring is hidden.
    "contextparallel": Priced(inside="ranks=2", given=RANKS, load=PROMPT, share=(0.5, 0.503)),
    # The last results show: 15,000 rows of 4,096 values of 2 bytes in each of 32 layers are 8.7 ms of 1.25 s.
    "tokenring": Priced(inside="ranks=2", given=RANKS, load=PROMPT, share=(0.505, 0.51)),
    # And all of the exchanges.
    "ulysses": Priced(inside="ranks=2", given=RANKS, load=PROMPT, share=(0.508, 0.515)),
    # Beside its quarter each host computes an anchor of a quarter of that: 0.31 of the products. Of attention the last one has
    # (0.5 + 0.25 + 3 / 8) / 16 of the pairs and 1 / 512 for the anchor's own, which were 0.5: 0.14.
    "apb": Priced(inside="ranks=4", given=RANKS, load=PROMPT, share=(0.225, 0.245)),
    # Four parts on two stages take five turns in place of eight, and without a barrier four.
    "megatron": Priced(inside="stages=2, micro=4", given=WHOLE, load=FOUR, share=(0.625, 0.635)),
    "energonai": Priced(inside="stages=2, micro=4", given=WHOLE, load=FOUR, share=(0.5, 0.51)),
    # Sums are 0.28 of a prompt's time, and hidden but for 0.016 of what is left.
    "iso": Priced(given={"hardware": "rtx4090", "model": "qwen3-32b", "devices": 4, "max_rows": 4096}, load=FOUR[:1],
                  share=(0.7, 0.74)),
    # As above over NVLink, and two parts have the waves of the whole.
    "tokenweave": Priced(given={"model": "llama-3.1-70b", "devices": 8, "max_rows": 4096}, load=FOUR[:1], share=(0.69, 0.73)),
    # A step of 25 ms is filled with training up to 0.8 of 50 ms.
    "flexllm": Priced(load=[ask(0.0, 0, 1000, 5)], share=(1.55, 1.65)),
    # 100 contexts of 2,001 entries of 128 KiB take 9.8 ms on the device itself; on others this is hidden behind the products
    # of both halves, each of which reads all weights, 5.6 ms, and the host has 2.2: 13.4 of 17.6.
    "lamina": Priced(given=WHOLE, load=MANY, step=1, share=(0.75, 0.78)),
    # Three parts would read them three times, 16.8 ms: one after the other 5.6, 0.4 of the head, 3.3 of contexts on three times
    # the bandwidth, and what the link and the host take, 11.9.
    "afd": Priced(given=WHOLE, load=MANY, step=1, share=(0.66, 0.69)),
    # Some 90 such contexts are 8.8 ms, hidden beside 50 ms of products.
    "nanoflow": Priced(inside="efficiency=1.0", given=CHUNKS, load=MIXED, step=90, share=(0.8, 0.9)),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in names("cost") if getattr(lookup("cost", n), "claim", None)])
def test_a_cost_by_hand(name: str) -> None:
    """A step takes less time or more, so that who comes meanwhile gets into another one."""
    case = PRICES[name]
    given, costs, k = case.given, ("roofline", f"{name}({case.inside})"), case.step
    alone = [logs(case.load, "fcfs", cost=cost, **given)[0] for cost in costs]
    assert [rows for _, rows in alone[0]] == [rows for _, rows in alone[1]]
    plain_s, priced_s = (log[k + 1][0] - log[k][0] for log in alone)
    assert case.share[0] < priced_s / plain_s < case.share[1]
    at = (alone[0][k + 1][0] + alone[1][k + 1][0]) / 2
    late = [*case.load, replace(ask(at, 1 << 20, 50, 1), priority=-1)]  # before other prompts that wait
    found = [logs(late, "fcfs", cost=cost, **given)[0] for cost in costs]
    entered = [next(i for i, (_, rows) in enumerate(log) if len(late) in rows) for log in found]
    # Into the step that begins next, or where a prompt that has begun fills that one, the one behind it; where each takes less
    # time, more of them are before it.
    begun = [sum(began < at for began, _ in log) for log in alone]
    assert all(next_ <= step <= next_ + (name == "nanoflow") for step, next_ in zip(entered, begun, strict=True))
    assert (entered[0] < entered[1]) == (case.share[1] < 1)
    assert entered[0] != entered[1]
