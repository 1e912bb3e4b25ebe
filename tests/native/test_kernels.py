"""Norms, rotations, activations and sums, in every instruction set of this machine, beside the reference operations."""

from __future__ import annotations

import math

import pytest
import torch

from tests.native.machine import ISAS, MODULE, Machine
from weft import native
from weft.ops.choice import ACTIVATIONS
from weft.ops.ref import basic, rope


def test_the_kernels_were_built() -> None:
    """Where the tests run there is a compiler, so that the package must not have fallen back."""
    assert native.why_not() == ""
    assert "portable" in ISAS


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
        program.attend(0, 0, 0, 0, 0, 1, 1, 257, 1.0, 0.0, 0)
