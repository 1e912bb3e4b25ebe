"""Norms, rotations, activations and sums, in every instruction set of this machine, beside the reference operations."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import time
from pathlib import Path

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


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no list of what this processor has")
def test_no_instruction_set_of_this_processor_was_left_out() -> None:
    """By the flags that each one's kernels are compiled for; matrix registers also need a compiler that has them."""
    found = re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = set() if found is None else {*found[1].split()}  # other processors list theirs under other names
    wide = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    needed = {
        "amx": wide | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
        "avx512_bf16": wide | {"avx512_vnni", "avx512_bf16"}, "avx512_vnni": wide | {"avx512_vnni"}, "avx512": wide,
        "avx2": {"avx2", "fma"}, "portable": set(),
    }  # fmt: skip
    assert {*ISAS} == {isa for isa, some in needed.items() if some <= flags}


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"])
def test_what_a_compiler_does_not_make_it_need_not_understand(isa: str) -> None:
    """ARM's builds, and those of compilers without matrix registers, have these files without a word of the processor's own."""
    compiler = next(found for name in ("c++", "g++", "clang++") if (found := shutil.which(name)))
    source = Path(native.__file__).parent / "src" / f"isa_{isa}.cpp"
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DWEFT_ABSENT", str(source)]
    assert subprocess.run(command, check=False, capture_output=True, text=True).stderr == ""


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


def test_operations_by_rows_follow_each_other_on_one_thread() -> None:
    """Sum, norm, norm of heads, rope and the writing of keys, for which no thread waits for another: as one by one."""
    heads, dim, rows, block = 3, 64, 250, 16
    width = heads * dim
    before, x, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    angles = torch.randn(rows, dim // 2)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.arange(rows, dtype=torch.int32).resize_(256)
    tables, first, lengths = torch.arange(16), torch.zeros(1, dtype=torch.int64), torch.tensor([rows])
    slots = torch.arange(rows)
    for isa in ISAS:
        found = []
        for threads, together in ((1, False), (3, True), (3, True), (2, True), (5, True)):
            program, step = MODULE.Program(threads, isa), MODULE.Step()
            hidden, normed, arena = before.clone(), torch.zeros(rows, width), torch.zeros(16 * block, 2 * width)
            step.rows(rows, 0, 0, 0, 0, 0, 0, 0)
            step.angles(0, cos.data_ptr(), sin.data_ptr())
            step.place(
                0, arena.data_ptr(), block * 8 * width, positions.data_ptr(), block, block, tables.data_ptr(), 16,
                first.data_ptr(), lengths.data_ptr(), slots.data_ptr(), 0, 0,
            )  # fmt: skip
            at = [
                program.add(hidden.data_ptr(), x.data_ptr(), width, width),
                program.norm(
                    hidden.data_ptr(), width, weight.data_ptr(), normed.data_ptr(), width, 1, width, 1e-6, False
                ),
                program.norm(
                    normed.data_ptr(), width, weight.data_ptr(), normed.data_ptr(), width, heads, dim, 1e-6, False
                ),
                program.rope(normed.data_ptr(), width, heads, dim, dim // 2, 0),
                program.store(0, normed.data_ptr(), hidden.data_ptr(), width, heads, dim, 0),
            ]
            for first_at, stop in [(at[0], at[-1] + 1)] if together else [(i, i + 1) for i in at]:
                program.run(first_at, stop, step)
            found.append((hidden, normed, arena))
        for some in found[1:]:
            for got, wanted in zip(some, found[0], strict=True):
                assert torch.equal(got, wanted)
        assert found[0][2].abs().sum() > 0


@pytest.mark.skipif(not {"avx512_bf16", "avx512_vnni"} <= {*ISAS}, reason="this processor has no products of bfloat16")
def test_products_of_bfloat16_are_taken_where_they_are_faster_than_those_of_floats() -> None:
    """Two numbers in a word: half as many instructions, which some processors take more than twice as long for."""
    program, took = MODULE.Program(1, "avx512_bf16"), {"float32": math.inf, "bfloat16": math.inf}
    for _ in range(20):
        for kind, turns in (("float32", 40_000), ("bfloat16", 20_000)):
            began = time.perf_counter()
            program.arithmetic(turns, {"float32": 0, "bfloat16": 2}[kind])
            took[kind] = min(took[kind], time.perf_counter() - began)
    ratio = took["bfloat16"] / took["float32"]
    assert MODULE.Program(1).isa == ISAS[0]
    others = [isa for isa in ISAS if isa != "amx"]  # matrix registers come before both
    assert len(others) == len(ISAS) or ISAS[0] == "amx"
    assert {*others[:2]} == {"avx512_bf16", "avx512_vnni"}
    if not 0.8 < ratio < 1.25:  # else either will do
        assert (others[0] == "avx512_bf16") == (ratio < 1), ratio


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="this processor has no riscv"):
        MODULE.Program(1, "riscv")
    program = MODULE.Program(1)
    assert (program.threads, program.isa) == (1, ISAS[0])
    with pytest.raises(IndexError, match="no such operations"):
        program.run(0, 1, MODULE.Step())
    with pytest.raises(ValueError, match="heads of at most 256"):
        program.attend(0, 0, 0, 0, 0, 1, 1, 257, 1.0, 0.0, 0)
