"""Costs by hand: the roofline's formula, the lines of a calibration, the grid of a table; and the descriptions they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weft.cost._common import Rates
from weft.cost.calibrated import Calibrated
from weft.cost.megatron import Megatron
from weft.cost.nanoflow import NanoFlow
from weft.cost.roofline import Roofline
from weft.cost.table import Table
from weft.errors import ConfigError
from weft.models.layout import parameters
from weft.sim.load import load_of
from weft.sim.machines import hardware, hardware_names, link, model, model_names
from weft.slots.cost import Figures, Hardware, Kind, Link, Load
from weft.types import Plan, Work

WIRE = Link(name="wire", bytes_s=1e9, latency_s=1e-6)
DEVICE = Hardware(
    name="d", title="d", flops={"bfloat16": 1e12}, memory_bytes=10**9, memory_bytes_s=1e11, link=WIRE, host_link=WIRE,
    launch_s=1e-4,
)  # fmt: skip
KIND = Kind(window=None, pair_flops=4.0 * 64 * 2, entry_bytes=512)
MODEL = Figures(name="m", layers=2, width=64, dense_params=10**8, head_params=10**7, kinds=(KIND,), block_bytes=8192)
WHOLE = Roofline(compute=1.0, memory=1.0, attention=1.0, sequence_s=0.0)


def load(rows: int = 0, samples: int = 0, pairs: float = 0, read: float = 0, single: float = 0, **more: Any) -> Load:
    return Load(
        rows=rows,
        samples=samples,
        works=1,
        prompt_pairs=[pairs],
        prompt_entries=[read],
        decode_entries=[single],
        **more,
    )


def test_decoding_reads_weights_and_prompts_multiply_by_them() -> None:
    price = WHOLE.on(DEVICE, MODEL)
    one = price(load(1, 1, single=1000))
    # 1e8 parameters of 2 bytes at 1e11 B/s take 2 ms, their products 0.2 ms; the head 0.2 ms and 0.02 ms.
    assert one.weights == pytest.approx(2e-3 + 2e-4)
    # 1000 entries of 512 bytes, and one written; their 1000 pairs of 512 FLOPs take less.
    assert one.kv == pytest.approx(1001 * 512 / 1e11)
    assert one.attention == 0
    assert one.host == 1e-4
    many = price(load(100, 0, pairs=5050, read=100))
    assert many.weights == pytest.approx(100 * 2e8 / 1e12)
    assert many.attention == pytest.approx(5050 * 512 / 1e12)
    assert many.kv == pytest.approx(100 * 512 / 1e11)
    assert price(load()).total_s == 1e-4


def test_rows_between_layers_pay_for_the_layers_that_they_pass() -> None:
    """99 rows through half of the layers beside one decode through all: one half multiplies 100 rows, the other reads."""
    price = WHOLE.on(DEVICE, MODEL)
    parts = price(load(100, 1, spans=[(0.5, 100), (0.5, 1)]))
    assert parts.weights == pytest.approx(0.5 * 100 * 2e8 / 1e12 + 0.5 * 2e-3 + 2e-4)
    works = (
        Work(request=1, rows=((9, 10),), tokens=(0,), samples=True),
        Work(request=2, rows=((0, 9),), tokens=(0,) * 9, layers=(0, 1)),
    )
    found = load_of(Plan(step=1, works=works, rows=10, samples=1), MODEL, 2)
    assert found.spans == [(0.5, 10), (0.5, 1)]
    assert found.whole_rows == 5.5
    assert found.prompt_pairs == [0.5 * 45]
    assert found.decode_entries == [10]


def test_devices_share_the_work_and_tell_each_other() -> None:
    two = hardware("h100", 2)
    one, both = WHOLE.on(hardware("h100"), MODEL), WHOLE.on(two, MODEL)
    assert one(load(64)).communication == 0
    assert both(load(64)).weights == pytest.approx(one(load(64)).weights / 2)
    # Two sums a layer, each of which sends 2 (n - 1) / n of 64 rows x 64 values x 2 bytes, in 2 (n - 1) hops.
    wire = link("nvlink4")
    assert both(load(64)).communication == pytest.approx(4 * (64 * 64 * 2 / wire.bytes_s + 2 * wire.latency_s))


def test_a_mixture_reads_the_experts_that_are_hit() -> None:
    figures = model("qwen3-30b-a3b").figures
    assert figures.read_bytes(1) == pytest.approx(2.0 * figures.active_params)
    assert figures.read_bytes(10_000) == pytest.approx(2.0 * (figures.dense_params + 128 * figures.expert_params))


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.55), ("llama-2-7b", 6.74), ("llama-2-13b", 13.02), ("mistral-7b", 7.25),
     ("qwen2.5-7b", 7.62), ("qwen3-32b", 32.76), ("qwen3-30b-a3b", 30.53), ("qwen2.5-0.5b", 0.494)],
)  # fmt: skip
def test_built_in_shapes_have_the_published_sizes(name: str, billions: float) -> None:
    found = model(name)
    assert parameters(found.spec) / 1e9 == pytest.approx(billions, rel=2e-3)
    # All of them lie in memory: of a model whose table of tokens is not its head's, both.
    assert found.figures.stored_bytes / 2e9 == pytest.approx(billions, rel=2e-3)
    assert found.figures.stored_bytes == pytest.approx(2 * parameters(found.spec), rel=1e-4)


def test_every_description_is_read_and_has_a_source() -> None:
    assert {"a100", "h100", "h200", "b200", "l40s", "xeon", "cpu2"} <= set(hardware_names())
    for name in hardware_names():
        assert hardware(name).source
        assert hardware(name).link.source
    assert model("llama-3.1-8b").figures.kinds[0].entry_bytes == 2 * 8 * 128 * 2 * 32
    assert len(model_names()) >= 12
    with pytest.raises(ConfigError, match="did you mean h100"):
        hardware("h10")
    with pytest.raises(ConfigError, match=r"did you mean llama-3\.1-8b"):
        model("llama-3.1-8")
    with pytest.raises(ConfigError, match="more devices"):
        model("llama-3.1-70b").blocks(hardware("h100"))
    assert model("llama-3.1-70b").blocks(hardware("h100", 4)) > 1000


def test_a_hardware_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        '[hardware.box]\nflops = { bfloat16 = 1e12 }\nmemory_bytes = 1e9\nmemory_bytes_s = 1e10\nlink = "pcie4"\n'
    )
    assert hardware(f"{file}:box").memory_bytes == 10**9
    for old, new, text in (
        ("1e10", "-1", "above 0"),
        ('"pcie4"', '"string"', "no links 'string'"),
        ("[hardware.box]", "[hardware.", "cannot be read"),
    ):
        other = tmp_path / "bad.toml"
        other.write_text(file.read_text().replace(old, new))
        with pytest.raises(ConfigError, match=text):
            hardware(f"{other}:box")
        other.unlink()
        from weft.sim.machines import _toml

        _toml.cache_clear()


def test_a_calibration_is_lines_and_coefficients(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"rows": [[1, 0.001], [10, 0.002], [100, 0.011]], "step_s": 0.5, "sequence_s": 0.1,
                                "entry_s": 1e-6, "pair_s": 1e-7}))  # fmt: skip
    price = Calibrated(file=str(file)).on(DEVICE, MODEL)
    assert price(load(55)).weights == pytest.approx(0.0065)
    assert price(load(200)).weights == pytest.approx(0.021)  # the last slope goes on
    parts = price(load(10, single=100, pairs=50))
    assert parts.kv == pytest.approx(1e-4)
    assert parts.attention == pytest.approx(5e-6)
    assert parts.host == pytest.approx(0.6)
    assert Calibrated(file=str(file), scale=2.0).on(DEVICE, MODEL)(load(10)).weights == pytest.approx(0.004)
    for text in ("[]", "{", '{"rows": []}', '{"rows": [[2, 1], [1, 1]]}', '{"rows": [[1, -1]]}', '{"rows": [[1]]}',
                 '{"rows": [[1, 1]], "pair_s": "x"}'):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ConfigError):
            Calibrated(file=str(file)).on(DEVICE, MODEL)


def test_a_table_is_a_grid(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("rows,entries,weights_s,kv_s\n1,0,1,0\n1,100,1,2\n11,0,3,0\n11,100,3,4\n")
    price = Table(file=str(file)).on(DEVICE, MODEL)
    parts = price(load(6, single=50))
    assert parts.weights == pytest.approx(2.0)
    assert parts.kv == pytest.approx(1.5)
    for text in ("", "rows,entries\n", "rows,entries,foo_s\n1,1,1\n", "rows,entries,kv_s\n1,0,x\n",
                 "rows,entries,kv_s\n1,0,1\n2,1,1\n", "rows,entries,kv_s\n1,0,-1\n"):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ConfigError):
            Table(file=str(file)).on(DEVICE, MODEL)


def test_nanoflow_takes_the_longest_of_three_where_that_is_shorter() -> None:
    price = NanoFlow(compute=1.0, memory=1.0, attention=1.0, efficiency=1.0).on(DEVICE, MODEL)
    # 20 decodes of 20,000 entries each: products take 4 ms and reading their weights 2 ms, entries 2 ms.
    both = load(20, 20, single=400_000)
    both.works = 20
    compute = 20 * 2e8 / 1e12 + 20 * 2e7 / 1e12 + 400_000 * 512 / 1e12
    memory = 2 * (2e-3 + 2e-4) + 400_020 * 512 / 1e11  # weights are read twice, by two nano-batches
    assert sum(price(both)) - price(both).host == pytest.approx(max(compute, memory))
    # One sequence has no two halves, and a step of products alone is not shorter for being cut in two.
    single = load(1, 1, single=400_000)
    assert sum(price(single)) - price(single).host == pytest.approx(2e-3 + 2e-4 + 400_001 * 512 / 1e11)
    with pytest.raises(ValueError, match="nano"):
        NanoFlow(nano=1)


def test_a_pipeline_has_its_bubble() -> None:
    """Four micro-batches on two stages: five turns of half the model instead of eight, each with a fourth of the rows."""
    one = Megatron(stages=1, micro=1, compute=1.0, memory=1.0, attention=1.0).on(DEVICE, MODEL)
    two = Megatron(stages=2, micro=4, compute=1.0, memory=1.0, attention=1.0).on(DEVICE, MODEL)
    many = load(400)
    many.works = 4
    assert one(many).weights == pytest.approx(400 * 2e8 / 1e12)
    assert two(many).weights == pytest.approx(400 * 2e8 / 1e12 * 5 / 8)
    assert two(many).communication == pytest.approx(4 * (100 * 64 * 2 / 1e9 + 1e-6))
    few = load(4)
    few.works = 4
    assert two(few).weights == pytest.approx(2e-3 * 5 / 2)  # each micro-batch reads the weights of its stage


def test_operators_add_up_to_the_roofline() -> None:
    for one in (
        load(3, 3, single=900),
        load(200, 1, pairs=20100, read=200),
        load(50, 9, pairs=900, read=41, single=99),
    ):
        found = Rates(DEVICE, MODEL, "bfloat16", 1.0, 1.0, 1.0).operators(one)
        assert sum(max(o.compute_s, o.memory_s) for o in found) == pytest.approx(
            sum(WHOLE.on(DEVICE, MODEL)(one)) - 1e-4
        )
