"""Fine-tuning beside requests: windows worked by hand, and held against a search that tries every size."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from weft.config import Limits
from weft.cost.flexllm import FlexLLM
from weft.cost.roofline import Roofline
from weft.errors import ConfigError
from weft.registry import parse
from weft.sim.cluster import Cluster, Setting
from weft.sim.kinds import cluster_of
from weft.sim.machines import hardware, model
from weft.sim.run import Wanted, setting
from weft.sim.workload import UNIQUE, Arrival
from weft.slots.cost import Figures, Hardware, Kind, Link, Load

WIRE = Link(name="wire", bytes_s=1e9, latency_s=1e-6)
DEVICE = Hardware(
    name="d", title="d", flops={"bfloat16": 1e12}, memory_bytes=10**9, memory_bytes_s=1e11, link=WIRE, host_link=WIRE,
)  # fmt: skip
KIND = Kind(window=None, pair_flops=512.0, entry_bytes=512)
MODEL = Figures(name="m", layers=2, width=64, dense_params=10**5, head_params=10, kinds=(KIND,), block_bytes=8192)
"""A row's products take 0.2 us, and all weights are read in 2 us; a pair takes 0.512 ns."""
WHOLE: dict[str, Any] = {"compute": 1.0, "memory": 1.0, "attention": 1.0}


def step(rows: int, entries: float) -> Load:
    return Load(
        rows=rows, samples=rows, works=rows, prompt_pairs=[0.0], prompt_entries=[0.0], decode_entries=[entries],
        decode_rows=rows,
    )  # fmt: skip


def test_windows_by_hand() -> None:
    """Four answers of 100 entries: 2 us of weights, 0.0002 of the head, 2.06848 of entries, 8 of the host: 12.06868 us of 20.

    A training sequence of 31 tokens has 16 pairs a token, 0.008192 us; backward 0.02048.  Forward: (4 + s) 0.2 + 0.008192 s fits
    into the 2 + 7.93132 us of the products and of what is left up to s = 43.  Backward: 0.2 s + 0.02048 s fits 7.93132 up to 35.
    """
    parts = FlexLLM(tpot_s=20e-6, share=1.0, length=31, **WHOLE).on(DEVICE, MODEL)(step(4, 400))
    assert parts.trained == pytest.approx(43 * 35 / 78)
    ahead = 35 / 78
    forward = 12.06868 - 2 + 47 * 0.2 + 43 * 0.008192
    backward = 12.06868 + 35 * 0.2 + 35 * 0.02048
    assert parts.total_s == pytest.approx((ahead * forward + (1 - ahead) * backward) * 1e-6, rel=1e-6)
    assert 19.5e-6 < parts.total_s <= 20e-6


def test_rows_that_ride_on_the_reading_of_weights_cost_their_attention_alone() -> None:
    """Four rows leave room for six in the time in which weights are read; the limit lets one in that goes backward, just."""
    parts = FlexLLM(tpot_s=14.0e-6 + 0.36e-6, share=1.0, length=1, window=5, **WHOLE).on(DEVICE, MODEL)(step(4, 400))
    assert parts.trained == 2.5
    back = 2 + 5 * 0.000512 * 2.5
    assert parts.total_s == pytest.approx((12.06868 + 0.5 * 5 * 0.000512 + 0.5 * back) * 1e-6, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_windows_are_the_largest_that_fit(seed: int) -> None:
    chance = random.Random(seed)
    alone = Roofline(**WHOLE).on(DEVICE, MODEL)
    for _ in range(60):
        rows, entries, limit = chance.randrange(1, 40), chance.randrange(4000), chance.uniform(5e-6, 200e-6)
        length, window = chance.choice([1, 64, 4096]), chance.choice([7, 100, 400])
        parts = FlexLLM(tpot_s=limit, share=1.0, length=length, window=window, **WHOLE).on(DEVICE, MODEL)(
            step(rows, entries)
        )
        base, each = sum(alone(step(rows, entries))), (length + 1) / 2 * 512e-12
        layers = max(rows * 0.2e-6, 2e-6)

        def forward(s: int) -> float:
            return base - layers + max((rows + s) * 0.2e-6, 2e-6) + s * each  # noqa: B023

        def backward(s: int) -> float:
            return base + max(s * 0.2e-6, 2e-6) + 2.5 * s * each  # noqa: B023

        f = max((s for s in range(window + 1) if forward(s) <= limit), default=0)
        b = max((s for s in range(window + 1) if backward(s) <= limit), default=0)
        if not f or not b:
            assert parts.trained == 0
            assert parts == pytest.approx(alone(step(rows, entries)))
        else:
            assert parts.trained == pytest.approx(f * b / (f + b))
            assert parts.total_s == pytest.approx((b * forward(f) + f * backward(b)) / (f + b))


def test_alone_it_trains_what_four_products_for_each_parameter_allow() -> None:
    peak = FlexLLM(length=31, **WHOLE).on(DEVICE, MODEL).peak_tok_s
    assert peak == pytest.approx(1e6 / (2 * 0.2 + 16 * 0.000512 * 3.5))


def simulated(arrivals: list[Arrival], cost: Any, *, coasting: bool = True) -> Cluster:
    limits = Limits(max_model_len=4000, max_num_seqs=64, max_rows=256, max_samples=64)
    wanted = Setting(
        model=model("llama-3.1-8b"), hardware=hardware("h100"), cost=cost, parts=[parse("schedule=fcfs")],
        limits=limits, blocks=20_000, coasting=coasting,
    )  # fmt: skip
    cluster = Cluster(wanted)
    cluster.run(arrivals)
    return cluster


def crowd(n: int, pace: float) -> list[Arrival]:
    chance, now, found = random.Random("flexllm"), 0.0, []
    for i in range(n):
        now += chance.expovariate(pace)
        found.append(Arrival(now, ((UNIQUE + i, chance.randrange(20, 400)),), chance.randrange(2, 200)))
    return found


def test_answers_keep_their_limit_and_idle_time_is_trained_in() -> None:
    load = crowd(80, 4.0)
    plain, both = simulated(load, Roofline()), simulated(load, FlexLLM())
    result = both.result()
    assert "trained_share" not in plain.result()
    assert plain.result()["tpot_s"]["p99"] < result["tpot_s"]["p50"]
    assert result["tpot_s"]["p99"] <= 0.8 * 0.05 + 1e-9
    assert result["finished"] == 80
    # Between steps alone there would be what the device is not busy for; beside them there is more than that by far.
    assert result["trained_share"] > 0.6 > 5 * (1 - plain.result()["utilization"])
    single = simulated(load, FlexLLM(), coasting=False)
    assert single.meter.trained == pytest.approx(both.meter.trained)
    assert single.result()["trained_tok_s"] == pytest.approx(result["trained_tok_s"])
    # Two requests far apart: nearly all of the time is the job's.
    lonely = [replace(load[0], time_s=0.0), replace(load[1], time_s=200.0)]
    rare = simulated(lonely, FlexLLM())
    told, peak = rare.result(), rare.peak_tok_s
    idle_s = told["duration_s"] - rare.meter.busy_s
    assert told["trained_tok_s"] * told["duration_s"] == pytest.approx(idle_s * peak + rare.meter.trained)
    assert 0.95 < told["trained_share"] < 1


def test_it_is_not_priced_where_phases_share_a_device() -> None:
    with pytest.raises(ConfigError, match="no fine-tuning"):
        cluster_of(setting(Wanted(trace="", cost="flexllm", policy="semipd")))


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"tpot_s": 0.0}, {"length": 0}, {"window": 0}, {"memory": 1.5}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        FlexLLM(**wrong)
