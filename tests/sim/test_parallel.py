"""Costs of many devices, worked by hand from their papers' formulas: what passes between devices, and what hides behind what."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from weft.cost._common import two_streams
from weft.cost.afd import AFD
from weft.cost.apb import APB
from weft.cost.contextparallel import ContextParallel
from weft.cost.energonai import EnergonAI
from weft.cost.iso import ISO
from weft.cost.lamina import Lamina
from weft.cost.megatron import Megatron
from weft.cost.roofline import Roofline
from weft.cost.tokenring import TokenRing
from weft.cost.tokenweave import TokenWeave
from weft.cost.ulysses import Ulysses
from weft.sim.machines import hardware, model
from weft.sim.run import Wanted, setting
from weft.slots.cost import Figures, Hardware, Kind, Link, Load

WIRE = Link(name="wire", bytes_s=1e9, latency_s=1e-6)
DEVICE = Hardware(
    name="d", title="d", flops={"bfloat16": 1e12}, memory_bytes=10**9, memory_bytes_s=1e11, link=WIRE, host_link=WIRE,
)  # fmt: skip
KIND = Kind(window=None, pair_flops=4.0 * 64 * 2, entry_bytes=512)
"""2 layers of 64 values: a row's queries have 256 bytes, its keys and values 512, as many heads of each."""
MODEL = Figures(name="m", layers=2, width=64, dense_params=10**5, head_params=10, kinds=(KIND,), block_bytes=8192)
WHOLE: dict[str, Any] = {"compute": 1.0, "memory": 1.0, "attention": 1.0}


def prompt(rows: int, before: int = 0) -> Load:
    pairs = sum(range(before + 1, before + rows + 1))
    return Load(rows=rows, works=1, prompt_pairs=[pairs], prompt_entries=[before + rows], decode_entries=[0.0])


def decodes(n: int, entries: float) -> Load:
    return Load(
        rows=n, samples=n, works=n, prompt_pairs=[0.0], prompt_entries=[0.0], decode_entries=[entries], decode_rows=n
    )


def test_queries_pass_where_they_are_fewer_bytes_than_keys_and_values() -> None:
    price = ContextParallel(ranks=2, **WHOLE).on(DEVICE, MODEL)
    parts = price(prompt(100))
    assert parts.weights == pytest.approx(100 * 2e5 / 1e12 / 2)
    assert parts.attention == pytest.approx(5050 * 512 / 1e12 / 2)
    hidden = (5050 * 512 / 1e12 / 2 + 100 * 512 / 1e11 / 2) / 2
    # Queries: one block of 50 rows around, 1 us of latency; half of its results back.
    queries = (50 * 256 / 1e9 + 1e-6 - hidden) + (25 * 256 / 1e9 + 1e-6)
    assert parts.communication == pytest.approx(queries)
    few = replace(MODEL, kinds=(replace(KIND, entry_bytes=64),))  # 8 heads of queries for one of keys
    keys = 50 * 64 / 1e9 + 1e-6 - (5050 * 512 / 1e12 / 2 + 100 * 64 / 1e11 / 2) / 2
    assert ContextParallel(ranks=2, **WHOLE).on(DEVICE, few)(prompt(100)).communication == pytest.approx(keys)


@pytest.mark.parametrize("group", [2, 4, 8, 16])
def test_the_choice_is_that_of_the_paper_s_threshold(group: int) -> None:
    """T new rows after P: queries move less than K and V where T / (T + P) < 2 N_kv / N_heads (the results go back beside)."""
    free = replace(WIRE, latency_s=0.0)
    device = replace(DEVICE, link=free, flops={"bfloat16": 1e24}, memory_bytes_s=1e24)  # nothing hides anything
    shape = replace(MODEL, kinds=(replace(KIND, entry_bytes=512 // group),))
    for new in (10, 100, 1000):
        for before in (0, 50, 1000, 20_000):
            told = ContextParallel(ranks=2, **WHOLE).on(device, shape)(prompt(new, before)).communication
            keys, queries = (new + before) * 512 / group / 2 / 1e9, new * 256 / 2 / 1e9
            assert told == pytest.approx(min(keys, queries * 1.5), rel=1e-6)
            assert (queries < keys) == (new / (new + before) < 2 / group)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_ring_in_both_directions_has_half_the_time_for_equal_heads_and_loses_for_few_keys(ranks: int) -> None:
    slow = replace(DEVICE, link=replace(WIRE, latency_s=0.0), flops={"bfloat16": 1e24}, memory_bytes_s=1e24)
    told = {}
    for group in (1, 2, 4):
        shape = replace(MODEL, kinds=(replace(KIND, entry_bytes=512 // group),))
        ring = TokenRing(ranks=ranks, **WHOLE).on(slow, shape)(prompt(960)).communication
        assert ring == pytest.approx(ranks * 960 * 256 / ranks / 1e9)  # N - 1 passes, and the last results
        told[group] = ring / ((ranks - 1) * 960 * 512 / group / ranks / 1e9)  # beside passing K and V
    assert told[1] == pytest.approx(ranks / (ranks - 1) / 2)
    assert told[4] > 1


def test_ulysses_sends_what_its_formula_says() -> None:
    parts = Ulysses(ranks=4, **WHOLE).on(DEVICE, MODEL)(prompt(100))
    # Q, K, V out and results back, 4 N d / P values of 2 bytes a layer, of which 1/P stays where it is.
    assert parts.communication == pytest.approx(0.75 * 2 * (4 * 100 * 64 / 4 * 2) / 1e9 + 4 * 1e-6)
    assert Ulysses(ranks=1).on(DEVICE, MODEL)(prompt(100)).communication == 0


def test_apb_meets_what_the_last_host_meets() -> None:
    """Rows of the last of 4 hosts, counted one by one: the anchor, what others pass on, and the block itself."""
    hosts, rows = 4, 4096
    block = rows // hosts
    anchor, passed = block // 4, block // 8
    met = sum(anchor + (hosts - 1) * passed + i + 1 for i in range(block)) + anchor * (anchor + 1) // 2
    price = APB(ranks=hosts, **WHOLE).on(DEVICE, MODEL)
    assert price(prompt(rows)).attention == pytest.approx(met * 512 / 1e12, rel=0.01)
    assert price(prompt(rows)).communication == pytest.approx((hosts - 1) * passed * 512 / 1e9 + 2e-6)
    assert price(prompt(rows)).weights == pytest.approx((block + anchor) * 2e5 / 1e12)
    exact = ContextParallel(ranks=hosts, **WHOLE).on(DEVICE, MODEL)
    assert price(prompt(rows)).attention < exact(prompt(rows)).attention
    assert price(prompt(512)).attention == pytest.approx(exact(prompt(512)).attention)  # too short to be cut


def simulated(computes: float, tells: float, phases: int) -> float:
    """Two halves that take turns on one device and one link, event by event."""
    device = link = 0.0
    ready = [0.0, 0.0]
    for _ in range(phases):
        for half in (0, 1):
            device = max(device, ready[half]) + computes / 2
            link = max(link, device) + tells / 2
            ready[half] = link
    return max(ready)


@pytest.mark.parametrize("seed", range(5))
def test_two_halves_take_turns(seed: int) -> None:
    chance = random.Random(seed)
    computes, tells, phases = chance.uniform(0.1, 2), chance.uniform(0.1, 2), chance.randrange(1, 60)
    assert two_streams(computes * phases, tells * phases, phases) == pytest.approx(simulated(computes, tells, phases))


def test_iso_hides_sums_of_prompts_and_not_of_decodes() -> None:
    two = replace(DEVICE, devices=2)
    serial = Roofline(sequence_s=0.0, **WHOLE).on(two, MODEL)(prompt(1000))
    cut = ISO(least=256, **WHOLE).on(two, MODEL)(prompt(1000))
    computed = serial.total_s - serial.communication
    hops = 4 * 2 * 1e-6
    # Halves of a sum have half the bytes and all the hops.
    assert cut.total_s - 2e-6 == pytest.approx(simulated(computed / 4, (serial.communication + hops) / 4, 4))
    few = ISO(least=256, bits=8.0, **WHOLE).on(two, MODEL)(decodes(100, 1000))
    whole = Roofline(**WHOLE).on(two, MODEL)(decodes(100, 1000)).communication
    assert few.communication == pytest.approx((whole - hops) / 2 + hops)


def test_prefill_on_slow_links_gains_what_iso_reports_and_on_fast_ones_less() -> None:
    """35 % on 4090 with PCIe and 15 % on A800, says the paper; without anything fitted."""
    shape, gains = model("llama-2-70b").figures, {}
    for device in ("rtx4090", "a100"):
        machine = hardware(device, 4)
        load = Load(rows=2048, works=1, prompt_pairs=[2048 * 2049 / 2], prompt_entries=[2048.0], decode_entries=[0.0])
        one, cut = (c.on(machine, shape)(load).total_s for c in (Roofline(host_s=0.0), ISO()))
        gains[device] = 1 - cut / one
    assert 0.2 < gains["rtx4090"] < 0.5
    assert 0.03 < gains["a100"] < 0.2


def test_tokenweave_splits_where_waves_allow() -> None:
    shape, machine = model("llama-3.1-70b").figures, hardware("h100", 8)

    def gain(rows: int) -> float:
        load = Load(rows=rows, works=1, prompt_pairs=[rows * rows / 2], prompt_entries=[rows], decode_entries=[0.0])
        whole = Roofline(host_s=0.0, sequence_s=2e-6).on(machine, shape)(load).total_s
        return 1 - (TokenWeave().on(machine, shape)(load).total_s - machine.launch_s) / whole

    assert gain(256) == pytest.approx(0.0, abs=1e-6)
    assert gain(1023) == pytest.approx(0.0, abs=1e-6)
    # The paper has up to 29 %, with sums that are faster than those around a ring.
    assert all(0.15 <= gain(rows) <= 0.36 for rows in (2048, 4096, 8192))
    assert gain(8192) < gain(4096) < gain(2048)


def test_a_pipeline_without_barriers_has_no_bubble() -> None:
    many = decodes(400, 0.0)
    blocking = Megatron(stages=4, micro=4, **WHOLE).on(DEVICE, replace(MODEL, dense_params=10**8))(many)
    flowing = EnergonAI(stages=4, micro=4, **WHOLE).on(DEVICE, replace(MODEL, dense_params=10**8))(many)
    assert blocking.weights / flowing.weights == pytest.approx((4 + 4 - 1) / 4)
    one = EnergonAI(stages=4, micro=1, **WHOLE).on(DEVICE, replace(MODEL, dense_params=10**8))(many)
    assert one.weights == pytest.approx(4 * 400 * 2e8 / 1e12 / 4, rel=1e-3)  # one part passes all stages alone
    # What is parked comes beside computing: 2e8 bytes / 4 stages / 2 take 25 ms, the stage's products less.
    parked = EnergonAI(stages=4, micro=4, parked=0.5, **WHOLE).on(DEVICE, replace(MODEL, dense_params=10**8))(many)
    own = flowing.weights + flowing.attention + flowing.kv
    assert parked.communication - flowing.communication == pytest.approx(max(0.0, 0.5 * (2e8 + 20) / 4 / 1e9 - own))


def test_attention_on_other_devices_sends_what_the_formula_says() -> None:
    """(2 + 2 / G) d values of 2 bytes for each row and layer; AFD sends a hidden state there and back."""
    for group in (1, 4, 8):
        shape = replace(MODEL, kinds=(replace(KIND, entry_bytes=512 // group),))
        price = Lamina(batches=1, link_bytes_s=1e9, link_s=0.0, flops=1e12, bytes_s=1e12, **WHOLE).on(DEVICE, shape)
        parts = price(decodes(10, 5000))
        assert parts.communication == pytest.approx(10 * 2 * (2 + 2 / group) * 64 * 2 / 1e9)
        read = max(5000 * 512 / 1e12, 5000 * 512 / group / 1e12) + 10 * 512 / group / 1e12
        assert parts.kv + parts.attention == pytest.approx(read)
    parts = AFD(batches=1, link_bytes_s=1e9, link_s=0.0, **WHOLE).on(DEVICE, MODEL)(decodes(10, 5000))
    assert parts.communication == pytest.approx(10 * 2 * 2 * 64 / 1e9)


def test_parts_that_take_turns_take_the_longest_of_three() -> None:
    alone = AFD(batches=1, flops=1e12, bytes_s=1e12, link_bytes_s=1e9, link_s=0.0, **WHOLE).on(DEVICE, MODEL)
    turns = AFD(batches=3, flops=1e12, bytes_s=1e12, link_bytes_s=1e9, link_s=0.0, **WHOLE).on(DEVICE, MODEL)
    load = decodes(30, 90_000)
    one, three = alone(load), turns(load)
    products = max(30 * 2e5 / 1e12, 3 * 2e5 / 1e11) + max(30 * 20 / 1e12, 3 * 20 / 1e11)
    assert three.total_s - three.host == pytest.approx(max(products, one.attention + one.kv, one.communication))
    # Each of three parts reads the weights again: 3 * 2e5 bytes are 6 us, where 20 rows of products take 4 and the link 5.1.
    few = turns(decodes(20, 3000))
    assert few.total_s - few.host == pytest.approx(3 * (2e5 + 20) / 1e11)
    assert turns(decodes(2, 100)).total_s == pytest.approx(alone(decodes(2, 100)).total_s)


def test_entries_that_lie_apart_have_that_memory() -> None:
    """Four devices of 80 GB without weights, of which nine tenths are blocks of 16 tokens of 128 KiB each."""
    wanted = Wanted(trace="", cost="lamina")
    assert setting(wanted).kv_blocks() == int(0.9 * 4 * 80e9 // (16 * 131_072))
    assert setting(replace(wanted, blocks=77)).kv_blocks() == 77


def test_all_of_them_are_the_roofline_where_there_is_one_device() -> None:
    whole = Roofline(sequence_s=2e-6, **WHOLE).on(DEVICE, MODEL)
    for cost in (ContextParallel(ranks=1, **WHOLE), TokenRing(ranks=1, **WHOLE), Ulysses(ranks=1, **WHOLE), APB(ranks=1, **WHOLE),
                 ISO(**WHOLE), TokenWeave(**WHOLE), EnergonAI(stages=1, micro=1, **WHOLE)):  # fmt: skip
        for load in (prompt(2000), prompt(100, 900), decodes(20, 10_000)):
            assert cost.on(DEVICE, MODEL)(load).total_s == pytest.approx(whole(load).total_s), cost


@pytest.mark.parametrize("cost", [ContextParallel, TokenRing, Ulysses, APB])
def test_more_ranks_take_less_time_for_a_long_prompt(cost: Any) -> None:
    figures, machine = model("llama-3.1-8b").figures, hardware("h100")
    load = Load(rows=131_072, works=1, prompt_pairs=[131_072**2 / 2], prompt_entries=[131_072.0], decode_entries=[0.0])
    times = [cost(ranks=n).on(machine, figures)(load).total_s for n in (1, 2, 4, 8)]
    assert all(b < 0.75 * a for a, b in pairwise(times))
    with pytest.raises(ValueError, match="ranks"):
        cost(ranks=0)
