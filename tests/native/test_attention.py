"""Attention over stored rows, in every instruction set of this machine, beside a softmax in float64 over what is stored."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.native.machine import ISAS, MODULE, Machine
from weft.ops.ref.attention import merge
from weft.ops.ref.attention_mass import QUANTA

BLOCK, KV_HEADS, EACH = 16, 2, 3
STORES = {"float32": 0, "bfloat16": 1, "int8": 2}
PAIRS = {"float32": (), "bfloat16": ("amx", "avx512_bf16"), "int8": ("amx", "avx512_bf16", "avx512_vnni")}
"""Instruction sets that multiply such rows two numbers at a time, so that queries and weights are rounded."""


class Stored:
    """Keys and values of one sequence in blocks that lie in no order, and the same as float64 [entries, 2, kv_heads, D].

    tree: of each guess at the end, which guess it follows, -1 for the context.
    """

    def __init__(
        self, kind: str, entries: int, dim: int, tree: Sequence[int] = (),
        *, each: int = EACH, block: int = BLOCK, kv_heads: int = KV_HEADS, seed: int = 0,
    ) -> None:  # fmt: skip
        make = torch.Generator().manual_seed(seed)
        self.kind, self.entries, self.dim, self.tree, self.block = kind, entries, dim, tree, block
        self.kv_heads, self.heads = kv_heads, kv_heads * each
        plain = torch.randn(entries, 2, kv_heads, dim, generator=make)
        if kind == "int8":
            scale = plain.abs().amax(-1, keepdim=True) / 127
            whole = (plain / scale).round().to(torch.int8)
            rows = torch.cat([whole.view(torch.uint8), scale.view(torch.uint8)], -1)
            self.exact = whole.double() * scale.double()
        else:
            narrow = plain.to(getattr(torch, kind))
            rows, self.exact = narrow.view(torch.uint8), narrow.double()
        blocks = -(-entries // block)
        self.table = torch.randperm(blocks, generator=make)
        one = rows.shape[-1]
        arena = torch.full(
            (blocks, 2, block, kv_heads, one), 0x7F, dtype=torch.uint8
        )  # what is not there is no small number
        self.positions, first = torch.arange(entries), entries - len(tree)
        self.family = torch.ones(entries, len(tree), dtype=torch.bool)  # guesses that the row of an entry sees
        for guess, parent in enumerate(tree):
            self.family[first + guess] = self.family[first + parent] if parent >= 0 else False
            self.family[first + guess, guess] = True
            self.positions[first + guess] = first if parent < 0 else self.positions[first + parent] + 1
        held = torch.full((blocks, block), 2**31 - 1, dtype=torch.int32)
        for entry in range(entries):
            at = self.table[entry // block]
            arena[at, :, entry % block] = rows[entry]
            held[at, entry % block] = self.positions[entry]
        self.arena, self.held = arena.view(blocks, -1), held

    def where(self, rows: int) -> Tensor:
        """The entries of the last rows."""
        return torch.arange(self.entries - rows, self.entries)

    def bits(self, where: Tensor) -> Tensor:
        """The guesses that rows see, as the kernels know them: all bits of those before the tree."""
        bits = torch.where(self.family[where], 1 << torch.arange(len(self.tree)), 0).sum(1)
        return bits.masked_fill(where < self.entries - len(self.tree), -1)

    def step(self, machine: Machine, where: Tensor, window: int, bias: Tensor | None) -> tuple[Any, Any]:
        """A step of the rows of some entries, and what it points to."""
        step, rows = MODULE.Step(), len(where)
        by_block = torch.full((len(self.table) * self.block,), float("nan"))
        if bias is not None:
            order = torch.arange(self.entries)
            by_block[self.table[order // self.block] * self.block + order % self.block] = bias
        positions, bounds, first = self.positions[where], torch.tensor([0, rows]), torch.zeros(1, dtype=torch.int64)
        lengths, slots = torch.tensor([self.entries]), torch.full((rows,), -1)
        guesses = torch.tensor([len(self.tree)], dtype=torch.int32)
        bits = self.bits(where)
        trees = (bits.data_ptr(), guesses.data_ptr()) if self.tree else (0, 0)
        step.rows(rows, 0, 0, 0, positions.data_ptr(), bounds.data_ptr(), *trees)
        step.place(
            0, self.arena.data_ptr(), self.arena.stride(0), self.held.data_ptr(), self.block, self.block,
            self.table.data_ptr(), len(self.table), first.data_ptr(), lengths.data_ptr(), slots.data_ptr(), window,
            STORES[self.kind], 0 if bias is None else by_block.data_ptr(),
        )  # fmt: skip
        step.plan(0, [0], 0, 0, self.heads, self.kv_heads, self.dim, machine.program.threads)
        return step, (by_block, positions, bounds, first, lengths, slots, guesses, bits)

    def attend(self, machine: Machine, q: Tensor, where: Tensor, window: int = 0, cap: float = 0.0) -> Tensor:
        """q: [rows, heads * D].  where: the entry of each row."""
        return self.attend_and_sum(machine, q, where, window, cap)[0]

    def attend_and_sum(
        self, machine: Machine, q: Tensor, where: Tensor, window: int = 0, cap: float = 0.0, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same, and log-sum-exp [rows, heads].  bias: of each entry, float32 [entries]."""
        step, _kept = self.step(machine, where, window, bias)
        out, lse = torch.full_like(q, 7.0), torch.full((len(q), self.heads), 7.0)
        index = machine.program.attend(
            0, q.data_ptr(), q.stride(0), out.data_ptr(), out.stride(0), self.heads, self.kv_heads, self.dim,
            self.dim**-0.5, cap, 0, lse.data_ptr(),
        )  # fmt: skip
        machine.program.run(index, index + 1, step)
        return out, lse

    def weigh(
        self, machine: Machine, q: Tensor, where: Tensor, sums: Tensor, window: int = 0, bias: Tensor | None = None
    ) -> Tensor:
        """Attention by entry, float64 [sums, kv_heads, entries].  sums: of each row, the sum that it counts in, -1 for none."""
        step, _kept = self.step(machine, where, window, bias)
        found = torch.zeros(int(sums.max()) + 1, self.kv_heads, len(self.table) * self.block, dtype=torch.int64)
        machine.program.weigh(
            step, 0, sums.data_ptr(), found.data_ptr(), found.shape[2], q.data_ptr(), q.stride(0), self.heads, self.kv_heads,
            self.dim, self.dim**-0.5, 0.0, 0,
        )  # fmt: skip
        assert (found[:, :, self.entries :] == 0).all()
        return found[:, :, : self.entries].double() / QUANTA

    def wanted(self, q: Tensor, where: Tensor, window: int = 0, cap: float = 0.0) -> Tensor:
        return self.wanted_and_sum(q, where, window, cap)[0]

    def wanted_and_sum(
        self, q: Tensor, where: Tensor, window: int = 0, cap: float = 0.0, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        scores = self.scores(q, where, window, cap, bias)
        mixed = torch.einsum("rghe,egd->rghd", torch.softmax(scores, -1), self.exact[:, 1]).reshape(q.shape)
        return mixed, torch.logsumexp(scores, -1).flatten(1)

    def scores(self, q: Tensor, where: Tensor, window: int = 0, cap: float = 0.0, bias: Tensor | None = None) -> Tensor:
        """Of each row with each entry, -inf where it does not see it: float64 [rows, kv_heads, heads of each, entries]."""
        rows = q.double().view(len(q), self.kv_heads, self.heads // self.kv_heads, self.dim)
        scores = torch.einsum("rghd,egd->rghe", rows, self.exact[:, 0]) * self.dim**-0.5
        scores = cap * torch.tanh(scores / cap) if cap else scores
        scores = scores if bias is None else scores + bias
        gap = self.positions[where][:, None] - self.positions
        hidden = (gap < 0) | ((gap >= window) if window else torch.zeros_like(gap, dtype=torch.bool))
        hidden[:, self.entries - len(self.tree) :] |= ~self.family[where]
        return scores.masked_fill(hidden[:, None, None], float("-inf"))


def queries(rows: int, dim: int, heads: int = KV_HEADS * EACH) -> Tensor:
    return torch.randn(rows, heads * dim, generator=torch.Generator().manual_seed(1)) * 2


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
    most, mean = closeness(machine, kind)
    assert gap.max() < most
    assert gap.mean() < mean


def closeness(machine: Machine, kind: str) -> tuple[float, float]:
    """The most that a value may be off, and the mean of that."""
    rounded = machine.program.isa in PAIRS[kind]
    # Pairs of bfloat16 keep 8 digits of queries and weights; those of whole numbers 15.
    return (3e-2, 3e-3) if rounded and kind == "bfloat16" else (1e-3, 1e-4) if rounded else (2e-5, 2e-6)


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize(
    ("entries", "rows", "window", "cap"), [(333, 1, 0, 0.0), (64, 5, 0, 30.0), (200, 40, 70, 0.0), (1, 1, 0, 0.0)]
)
def test_biases_of_entries_and_the_sum_that_is_handed_out(
    machine: Machine, kind: str, entries: int, rows: int, window: int, cap: float
) -> None:
    """An entry that stands for n merged ones has the bias log n; one with -inf is not there."""
    stored, q = Stored(kind, entries, 64), queries(rows, 64)
    positions = torch.arange(entries - rows, entries)
    make = torch.Generator().manual_seed(5)
    bias = torch.randint(1, 9, (entries,), generator=make).float().log()
    if entries > 100:
        bias[torch.randperm(entries, generator=make)[: entries // 3]] = float("-inf")
        bias[entries - rows :] = 0.5  # each row sees some entry
    for given in (None, bias):
        out, lse = stored.attend_and_sum(machine, q, positions, window, cap, given)
        wanted, sums = stored.wanted_and_sum(q, positions, window, cap, given)
        most, mean = closeness(machine, kind)
        assert (out - wanted).abs().max() < most
        assert (out - wanted).abs().mean() < mean
        assert (lse - sums).abs().max() < most


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize(("each", "block"), [(1, 16), (14, 64), (16, 16), (24, 16), (32, 7), (7, 24)])
def test_any_group_of_heads_and_any_block(machine: Machine, kind: str, each: int, block: int) -> None:
    """Also with a soft cap and biases together; and a row alone has the bits that it has in company."""
    stored, q = Stored(kind, 150, 64, each=each, block=block), queries(7, 64, KV_HEADS * each)
    positions = torch.arange(143, 150)
    bias = torch.randint(1, 9, (150,), generator=torch.Generator().manual_seed(5)).float().log()
    for cap, given in ((0.0, None), (20.0, bias)):
        out, lse = stored.attend_and_sum(machine, q, positions, 90, cap, given)
        wanted, sums = stored.wanted_and_sum(q, positions, 90, cap, given)
        most, mean = closeness(machine, kind)
        assert (out - wanted).abs().max() < most
        assert (out - wanted).abs().mean() < mean
        assert (lse - sums).abs().max() < most
        for row in (0, 6):
            one = slice(row, row + 1)
            assert torch.equal(
                stored.attend_and_sum(machine, q[one].clone(), positions[one].clone(), 90, cap, given)[0], out[one]
            )


@pytest.mark.parametrize("kind", STORES)
def test_results_over_parts_merge_by_their_sums(machine: Machine, kind: str) -> None:
    """What two sets of entries give apart, each with the others at -inf, is by `ref.attention.merge` what all give together."""
    stored, q, positions = Stored(kind, 150, 64), queries(3, 64), torch.arange(147, 150)
    first = torch.rand(150, generator=torch.Generator().manual_seed(2)) < 0.5
    first[:140] = True  # some chunks hold nothing of the second set
    parts = [torch.zeros(150).masked_fill(hidden, float("-inf")) for hidden in (first, ~first)]
    found = [stored.attend_and_sum(machine, q, positions, bias=part) for part in parts]
    heads = KV_HEADS * EACH
    out, lse = merge([part[0].view(3, heads, 64) for part in found], [part[1] for part in found])
    whole, sums = stored.attend_and_sum(machine, q, positions)
    most, _ = closeness(machine, kind)
    assert (out.reshape(3, -1) - whole).abs().max() < most
    assert (lse - sums).abs().max() < most


def test_a_row_that_sees_nothing_has_the_sum_of_nothing(machine: Machine) -> None:
    stored, q = Stored("float32", 70, 64), queries(1, 64)
    nothing = torch.full((70,), float("-inf"))
    out, lse = stored.attend_and_sum(machine, q, torch.tensor([69]), bias=nothing)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()


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


@pytest.mark.parametrize("kind", STORES)
def test_scores_that_are_no_numbers_leave_a_row_its_bits(machine: Machine, kind: str) -> None:
    """Row 255 sees whole chunks when it stands alone; in company some of its neighbours see less of them."""
    stored, q, positions = Stored(kind, 300, 64), queries(30, 64), torch.arange(240, 270)
    by_entry = stored.arena.view(len(stored.table), 2, BLOCK, KV_HEADS, -1)
    for entry in (37, 150, 151, 201):
        by_entry[stored.table[entry // BLOCK], 0, entry % BLOCK, :, -4:] = torch.full((1,), float("nan")).view(
            torch.uint8
        )
    whole = stored.attend(machine, q, positions)
    assert whole.isfinite().any()
    for row in (0, 15, 16, 29):
        alone = stored.attend(machine, q[row : row + 1].clone(), positions[row : row + 1].clone())
        assert torch.equal(alone.view(torch.int32), whole[row : row + 1].view(torch.int32))


def test_large_and_tiny_queries_and_values(machine: Machine) -> None:
    """Whole numbers of 16 bits are scaled to each query, and to the weights of each chunk."""
    stored = Stored("int8", 130, 64)
    positions = torch.tensor([129])
    for size in (1e-6, 1.0, 300.0):
        q = queries(1, 64) * size
        gap = (stored.attend(machine, q, positions) - stored.wanted(q, positions)).abs().max()
        assert gap < (2e-2 if size > 1 else 1e-3)
