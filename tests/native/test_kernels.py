"""Each kernel, in every instruction set of this machine, beside the reference operations or float64 arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft import native
from weft.ops.choice import ACTIVATIONS
from weft.ops.cpu.panels import FORMATS, PANEL, Panels
from weft.ops.ref import basic, rope

MODULE = native.module()
ISAS = MODULE.isas() if MODULE is not None else []
ROWS = (0, 1, 2, 3, 5, 8, 12, 13, 31, 64, 200)


def test_the_kernels_were_built() -> None:
    """Where the tests run there is a compiler, so that the package must not have fallen back."""
    assert native.why_not() == ""
    assert "portable" in ISAS


@dataclass
class Machine:
    """A program, and a step of so many rows to run it on."""

    program: Any

    def run(self, index: int, rows: int, *, wanted: int = 0, tokens: Tensor | None = None, angles: Any = None) -> None:
        step = MODULE.Step()
        step.rows(rows, 0 if tokens is None else tokens.data_ptr(), wanted, 0, 0, 0, 0, 0)
        if angles is not None:
            step.angles(0, *(table.data_ptr() for table in angles))
        self.program.run(index, index + 1, step)


@pytest.fixture(params=[(isa, threads) for isa in ISAS for threads in (1, 3)], ids=lambda p: f"{p[0]}-{p[1]}")
def machine(request: pytest.FixtureRequest) -> Machine:
    isa, threads = request.param
    return Machine(MODULE.Program(threads, isa))


def panels(program: Any, weight: Tensor) -> Panels:
    outs, width = weight.shape
    memory = torch.zeros(-(-outs // PANEL) * PANEL * width * weight.element_size(), dtype=torch.uint8)
    made = Panels(memory, (outs, width), weight.dtype, program)
    made.pack(weight)
    return made


def product(machine: Machine, x: Tensor, weight: Panels, bias: Tensor | None, rows: int) -> Tensor:
    """Rows beyond `rows` must stay as they are."""
    outs, width = weight.shape
    out = torch.full((x.shape[0] + 1, outs), 7.0)
    index = machine.program.linear(
        x.data_ptr(), x.stride(0), weight.address, weight.format, outs, width,
        0 if bias is None else bias.data_ptr(), out.data_ptr(), out.stride(0), False,
    )  # fmt: skip
    machine.run(index, rows)
    assert (out[rows:] == 7.0).all()
    return out[:rows]


# ---------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("outs", "width"), [(1, 2), (16, 64), (31, 130), (144, 1536), (200, 2050)])
def test_a_product_is_right_and_a_rows_bits_do_not_depend_on_the_rows_beside_it(
    machine: Machine, dtype: torch.dtype, outs: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(outs)
    weight = (torch.randn(outs, width, generator=generator) * width**-0.5).to(dtype)
    x, bias = torch.randn(max(ROWS), width, generator=generator), torch.randn(outs, generator=generator)
    packed = panels(machine.program, weight)
    assert torch.equal(packed.unpacked(), weight)
    for given_bias in (bias, None):
        wanted = x.double() @ weight.double().t() + (0 if given_bias is None else given_bias.double())
        most = product(machine, x, packed, given_bias, max(ROWS))
        assert (most - wanted).abs().max() < 2e-5
        for rows in ROWS:
            assert torch.equal(product(machine, x, packed, given_bias, rows), most[:rows])
            if rows:
                assert torch.equal(product(machine, x[-rows:], packed, given_bias, rows), most[-rows:])


def test_threads_do_not_change_bits() -> None:
    weight, x = torch.randn(300, 700, generator=torch.Generator().manual_seed(1)), torch.randn(70, 700)
    for isa in ISAS:
        found = []
        for threads in (1, 2, 5):
            machine = Machine(MODULE.Program(threads, isa))
            found.append(product(machine, x, panels(machine.program, weight), None, 70))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_a_product_reads_no_row_but_its_own(machine: Machine) -> None:
    x = torch.full((5, 64), float("nan"))
    x[2] = 1.0
    packed = panels(machine.program, torch.ones(20, 64))
    assert (product(machine, x[2:], packed, None, 1) == 64.0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.data())
def test_panels_take_parts_at_any_output_and_in_any_format(outs: int, half: int, data: st.DataObject) -> None:
    program = MODULE.Program(2, data.draw(st.sampled_from(ISAS)))
    dtype = data.draw(st.sampled_from([*FORMATS]))
    whole = torch.randn(outs, 2 * half)
    cuts = sorted({0, outs, *data.draw(st.lists(st.integers(0, outs), max_size=4))})
    memory = torch.zeros(-(-outs // PANEL) * PANEL * 2 * half * dtype.itemsize, dtype=torch.uint8)
    made = Panels(memory, (outs, 2 * half), dtype, program)
    wanted = []
    for first, stop in zip(cuts, cuts[1:], strict=False):
        source = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
        part = whole[first:stop].to(source)
        made.pack(part, first)
        wanted.append(part.to(torch.float32).to(dtype))
    assert torch.equal(made.unpacked(), torch.cat(wanted))
    if outs > PANEL:
        assert torch.equal(made.rows(PANEL).unpacked(), torch.cat(wanted)[PANEL:])


def test_numbers_that_are_odd_survive_packing() -> None:
    strange = [float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-40, 6e-8, 65504.0, 3.0e38]
    for source in (torch.float32, torch.float16, torch.bfloat16):
        part = torch.tensor([strange + [1.0]]).to(source)
        for dtype in FORMATS:
            got = panels_of(part, dtype).unpacked()
            assert torch.equal(got.nan_to_num(1.5), part.float().to(dtype).nan_to_num(1.5))
            assert torch.equal(got.isnan(), part.isnan())


def panels_of(source: Tensor, dtype: torch.dtype) -> Panels:
    program = MODULE.Program(1, "portable")
    memory = torch.zeros(PANEL * source.shape[1] * dtype.itemsize, dtype=torch.uint8)
    made = Panels(memory, (source.shape[0], source.shape[1]), dtype, program)
    made.pack(source)
    return made


def test_embedding_is_the_weights_row(machine: Machine) -> None:
    for dtype in FORMATS:
        table = torch.randn(75, 34).to(dtype)
        packed = panels(machine.program, table)
        tokens = torch.tensor([74, 0, 31, -1, 16])
        out = torch.zeros(5, 40)
        index = machine.program.embed(packed.address, packed.format, 34, 2.5, out.data_ptr(), out.stride(0))
        machine.run(index, 5, tokens=tokens)
        assert torch.equal(out[:, :34], table.float()[tokens.clamp_min(0)] * 2.5)
        assert (out[:, 34:] == 0).all()


# ---------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(("rows", "heads", "width"), [(1, 1, 896), (7, 3, 64), (4, 1, 19), (0, 1, 8)])
def test_norm(machine: Machine, rows: int, heads: int, width: int) -> None:
    x, weight = torch.randn(rows + 1, heads * width + 5) * 3, torch.randn(width)
    out = torch.zeros(rows + 1, heads * width)
    index = machine.program.norm(
        x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr(), out.stride(0), heads, width, 1e-5, False
    )
    machine.run(index, rows)
    split = x[:rows, : heads * width].reshape(rows, heads, width)
    wanted = torch.empty_like(split)
    basic.rms_norm(split, weight, 1e-5, 0.0, wanted)
    assert torch.allclose(out[:rows].view(rows, heads, width), wanted, rtol=2e-6, atol=2e-6)
    assert (out[rows:] == 0).all()


@pytest.mark.parametrize(("dim", "pairs"), [(64, 32), (80, 20), (6, 3)])
def test_rope(machine: Machine, dim: int, pairs: int) -> None:
    x = torch.randn(5, 3 * dim + 2)
    angles = torch.randn(5, pairs)
    tables = angles.cos(), angles.sin()
    wanted = x.clone()
    rope.apply_rope(wanted[:, : 3 * dim].view(5, 3, dim), *tables)
    machine.run(machine.program.rope(x.data_ptr(), x.stride(0), 3, dim, pairs, 0), 5, angles=tables)
    assert torch.allclose(x, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("inner", [64, 37])
def test_gated(machine: Machine, activation: str, inner: int) -> None:
    x = torch.randn(6, 2 * inner) * 6
    x[0, :4] = torch.tensor([0.0, -100.0, 100.0, -87.5])
    out, gate = torch.zeros(6, inner), x[:, :inner].double()
    curve = gate if activation == "silu" else 2 * (2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    wanted = (gate * torch.sigmoid(curve) * x[:, inner:].double()).float()
    index = machine.program.gated(
        x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), inner, ACTIVATIONS[activation]
    )
    machine.run(index, 6)
    assert torch.allclose(out, wanted, rtol=1e-5, atol=1e-30)


def test_sums_and_soft_caps(machine: Machine) -> None:
    into, x = torch.randn(9, 37), torch.randn(9, 37)
    wanted = into + x
    machine.run(machine.program.add(into.data_ptr(), x.data_ptr(), 37, 37), 9)
    assert torch.equal(into, wanted)
    logits = torch.randn(3, 101) * 50
    wanted = basic.softcap_(logits.clone(), 30.0)
    machine.run(machine.program.softcap(logits.data_ptr(), 101, 30.0), 0, wanted=3)
    assert torch.allclose(logits, wanted, rtol=1e-5, atol=1e-5)


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="this processor has no riscv"):
        MODULE.Program(1, "riscv")
    program = MODULE.Program(1)
    assert (program.threads, program.isa) == (1, ISAS[0])
    with pytest.raises(IndexError, match="no such operations"):
        program.run(0, 1, MODULE.Step())
    with pytest.raises(ValueError, match="heads of at most 256"):
        program.attend(0, 0, 0, 0, 0, 1, 1, 257, 1.0, 0.0, 0, 0, 0)
