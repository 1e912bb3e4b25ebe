"""Attention over stored rows, in every instruction set of this machine, beside a softmax in float64 over what is stored."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.native.machine import ISAS, MODULE, Machine

BLOCK, KV_HEADS, EACH = 16, 2, 3
STORES = {"float32": 0, "bfloat16": 1, "int8": 2}
PAIRS = {"float32": (), "bfloat16": ("avx512_bf16",), "int8": ("avx512_bf16", "avx512_vnni")}
"""Instruction sets that multiply such rows two numbers at a time, so that queries and weights are rounded."""


class Stored:
    """Keys and values of one sequence in blocks that lie in no order, and the same as float64 [entries, 2, KV_HEADS, D]."""

    def __init__(self, kind: str, entries: int, dim: int, seed: int = 0) -> None:
        make = torch.Generator().manual_seed(seed)
        self.kind, self.entries, self.dim = kind, entries, dim
        plain = torch.randn(entries, 2, KV_HEADS, dim, generator=make)
        if kind == "int8":
            scale = plain.abs().amax(-1, keepdim=True) / 127
            whole = (plain / scale).round().to(torch.int8)
            rows = torch.cat([whole.view(torch.uint8), scale.view(torch.uint8)], -1)
            self.exact = whole.double() * scale.double()
        else:
            narrow = plain.to(getattr(torch, kind))
            rows, self.exact = narrow.view(torch.uint8), narrow.double()
        blocks = -(-entries // BLOCK)
        self.table = torch.randperm(blocks, generator=make)
        one = rows.shape[-1]
        arena = torch.full(
            (blocks, 2, BLOCK, KV_HEADS, one), 0x7F, dtype=torch.uint8
        )  # what is not there is no small number
        held = torch.full((blocks, BLOCK), 2**31 - 1, dtype=torch.int32)
        for entry in range(entries):
            block = self.table[entry // BLOCK]
            arena[block, :, entry % BLOCK] = rows[entry]
            held[block, entry % BLOCK] = entry
        self.arena, self.held = arena.view(blocks, -1), held

    def attend(self, machine: Machine, q: Tensor, positions: Tensor, window: int = 0, cap: float = 0.0) -> Tensor:
        """q: [rows, KV_HEADS * EACH * D]."""
        step, rows = MODULE.Step(), len(q)
        out = torch.full_like(q, 7.0)
        bounds, first = torch.tensor([0, rows]), torch.zeros(1, dtype=torch.int64)
        lengths, slots = torch.tensor([self.entries]), torch.full((rows,), -1)
        step.rows(rows, 0, 0, 0, positions.data_ptr(), bounds.data_ptr(), 0, 0)
        step.place(
            0, self.arena.data_ptr(), self.arena.stride(0), self.held.data_ptr(), BLOCK, BLOCK, self.table.data_ptr(),
            len(self.table), first.data_ptr(), lengths.data_ptr(), slots.data_ptr(), window, STORES[self.kind],
        )  # fmt: skip
        heads = KV_HEADS * EACH
        step.plan(0, [0], 0, 0, heads, KV_HEADS, self.dim, machine.program.threads)
        index = machine.program.attend(
            0,
            q.data_ptr(),
            q.stride(0),
            out.data_ptr(),
            out.stride(0),
            heads,
            KV_HEADS,
            self.dim,
            self.dim**-0.5,
            cap,
            0,
        )
        machine.program.run(index, index + 1, step)
        return out

    def wanted(self, q: Tensor, positions: Tensor, window: int = 0, cap: float = 0.0) -> Tensor:
        rows = q.double().view(len(q), KV_HEADS, EACH, self.dim)
        scores = torch.einsum("rghd,egd->rghe", rows, self.exact[:, 0]) * self.dim**-0.5
        scores = cap * torch.tanh(scores / cap) if cap else scores
        gap = positions[:, None] - torch.arange(self.entries)
        hidden = (gap < 0) | ((gap >= window) if window else torch.zeros_like(gap, dtype=torch.bool))
        weights = torch.softmax(scores.masked_fill(hidden[:, None, None], float("-inf")), -1)
        return torch.einsum("rghe,egd->rghd", weights, self.exact[:, 1]).reshape(len(q), -1)


def queries(rows: int, dim: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, KV_HEADS * EACH * dim, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize(
    ("dim", "entries", "rows", "window", "cap"),
    [(64, 333, 1, 0, 0.0), (64, 64, 5, 0, 30.0), (128, 200, 40, 70, 0.0), (96, 150, 3, 0, 0.0), (80, 97, 12, 33, 0.0),
     (256, 70, 2, 0, 0.0)],
)  # fmt: skip
def test_rows_beside_float64(
    machine: Machine, kind: str, dim: int, entries: int, rows: int, window: int, cap: float
) -> None:
    stored, q = Stored(kind, entries, dim), queries(rows, dim)
    positions = torch.arange(entries - rows, entries)
    gap = (stored.attend(machine, q, positions, window, cap) - stored.wanted(q, positions, window, cap)).abs()
    rounded = machine.program.isa in PAIRS[kind]
    # Pairs of bfloat16 keep 8 digits of queries and weights; those of whole numbers 15.
    most, mean = (3e-2, 3e-3) if rounded and kind == "bfloat16" else (1e-3, 1e-4) if rounded else (2e-5, 2e-6)
    assert gap.max() < most
    assert gap.mean() < mean


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", STORES)
def test_a_row_has_its_bits_whatever_stands_beside_it(isa: str, kind: str) -> None:
    stored, q, positions = Stored(kind, 700, 64), queries(90, 64), torch.arange(610, 700)
    whole = stored.attend(Machine(MODULE.Program(1, isa)), q, positions)
    for threads, cuts in ((1, (0, 1, 2, 90)), (2, (0, 37, 90)), (3, (0, 89, 90))):
        machine = Machine(MODULE.Program(threads, isa))
        for start, stop in pairwise(cuts):
            assert torch.equal(
                stored.attend(machine, q[start:stop].clone(), positions[start:stop].clone()), whole[start:stop]
            )


@pytest.mark.parametrize("kind", STORES)
def test_a_value_that_is_no_number_shows_where_it_is_seen(machine: Machine, kind: str) -> None:
    stored, q = Stored(kind, 40, 64), queries(2, 64)
    positions = torch.tensor([38, 39])
    clean = stored.attend(machine, q, positions)
    one = stored.arena.view(len(stored.table), 2, BLOCK, KV_HEADS, -1)[stored.table[2], 1, 39 % BLOCK, 0]
    one[-4:] = torch.full((1,), float("nan")).view(torch.uint8)  # a value, or the scale of all
    found = stored.attend(machine, q, positions)
    assert found[1, : EACH * 64].isnan().any()
    assert torch.equal(found[1, EACH * 64 :], clean[1, EACH * 64 :]), "of the other kv head"


def test_large_and_tiny_queries_and_values(machine: Machine) -> None:
    """Whole numbers of 16 bits are scaled to each query, and to the weights of each chunk."""
    stored = Stored("int8", 130, 64)
    positions = torch.tensor([129])
    for size in (1e-6, 1.0, 300.0):
        q = queries(1, 64) * size
        gap = (stored.attend(machine, q, positions) - stored.wanted(q, positions)).abs().max()
        assert gap < (2e-2 if size > 1 else 1e-3)
