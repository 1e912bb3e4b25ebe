"""Attention of sequences that begin alike and read those entries once, over all stored rows, in every instruction set."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from tests.native.machine import MODULE, Machine
from tests.native.test_attention import BLOCK, EACH, KV_HEADS, STORES, Stored, closeness, queries

DIM, HEADS = 64, KV_HEADS * EACH
CHUNK = MODULE.CHUNK


class Family:
    """Sequences that begin with entries of the first one, and have others behind them."""

    def __init__(self, kind: str, members: list[tuple[int, int, int, tuple[int, ...]]]) -> None:
        """Of each one: chunks that it has of the first one's, entries in all, rows, and the tree of its guesses."""
        self.sequences = [Stored(kind, n, DIM, tree, seed=s) for s, (_, n, _, tree) in enumerate(members)]
        self.common = [chunks for chunks, *_ in members]
        self.rows = [rows for _, _, rows, _ in members]
        first, blocks = self.sequences[0], [0, *accumulate(len(s.table) for s in self.sequences)]
        self.tables = torch.zeros(len(members), max(len(s.table) for s in self.sequences), dtype=torch.int64)
        self.biases = torch.rand(blocks[-1], BLOCK, generator=torch.Generator().manual_seed(8)).mul(9).ceil().log()
        for s, (one, chunks) in enumerate(zip(self.sequences, self.common, strict=True)):
            mine, same = self.tables[s, : len(one.table)], chunks * CHUNK
            mine.copy_(one.table + blocks[s])
            mine[: same // BLOCK] = first.table[: same // BLOCK]
            one.exact[:same] = first.exact[:same]
        self.arena = torch.cat([s.arena for s in self.sequences])
        self.held = torch.cat([s.held for s in self.sequences])

    def attend(self, machine: Machine, q: Tensor, window: int, biased: bool, shared: Tensor) -> tuple[Tensor, Tensor]:
        """shared: int64 [sequences, chunks], the same number where sequences have the same entries, else -1."""
        step, rows = MODULE.Step(), len(q)
        out, lse = torch.full_like(q, 7.0), torch.full((rows, HEADS), 7.0)
        bounds, lengths = torch.tensor([0, *accumulate(self.rows)]), torch.tensor([s.entries for s in self.sequences])
        own = [s.where(count) for s, count in zip(self.sequences, self.rows, strict=True)]
        positions = torch.cat([s.positions[where] for s, where in zip(self.sequences, own, strict=True)])
        bits = torch.cat([s.bits(where) for s, where in zip(self.sequences, own, strict=True)])
        guesses = torch.tensor([len(s.tree) for s in self.sequences], dtype=torch.int32)
        first, slots = torch.zeros(len(own), dtype=torch.int64), torch.full((rows,), -1)
        step.rows(rows, 0, 0, 0, positions.data_ptr(), bounds.data_ptr(), bits.data_ptr(), guesses.data_ptr())
        step.place(
            0, self.arena.data_ptr(), self.arena.stride(0), self.held.data_ptr(), BLOCK, BLOCK, self.tables.data_ptr(),
            self.tables.stride(0), first.data_ptr(), lengths.data_ptr(), slots.data_ptr(), window,
            STORES[self.sequences[0].kind], self.biases.data_ptr() if biased else 0,
        )  # fmt: skip
        step.plan(
            0, list(range(len(own))), shared.data_ptr(), shared.shape[1], HEADS, KV_HEADS, DIM, machine.program.threads
        )
        index = machine.program.attend(
            0, q.data_ptr(), q.stride(0), out.data_ptr(), out.stride(0), HEADS, KV_HEADS, DIM, DIM**-0.5, 0.0, 0, lse.data_ptr()
        )  # fmt: skip
        machine.program.run(index, index + 1, step)
        return out, lse

    def wanted(self, q: Tensor, window: int, biased: bool) -> tuple[Tensor, Tensor]:
        found = []
        for s, (start, stop) in enumerate(pairwise([0, *accumulate(self.rows)])):
            one = self.sequences[s]
            bias = self.biases[self.tables[s]].flatten()[: one.entries] if biased else None
            found.append(one.wanted_and_sum(q[start:stop], one.where(stop - start), window, bias=bias))
        return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize(
    ("members", "window"),
    [
        ([(2, 150, 1, ()), (2, 131, 1, ()), (1, 140, 1, ()), (2, 129, 1, ()), (0, 90, 1, ())], 0),
        ([(2, 150, 1, ()), (2, 131, 1, ()), (1, 140, 1, ()), (2, 129, 1, ()), (0, 90, 1, ())], 70),
        ([(3, 260, 7, ()), (3, 195, 2, ()), (1, 70, 3, ()), (3, 193, 1, ())], 0),
        ([(2, 160, 9, (-1, 0, 0, 1, -1)), (2, 131, 1, ()), (2, 140, 3, (-1, 0, 1, 1))], 0),
        ([(2, 160, 1, ()), (2, 131, 2, (-1, 0, -1))], 100),
    ],
)
def test_what_is_read_once_gives_what_reading_it_each_time_gives(
    machine: Machine, kind: str, members: list[tuple[int, int, int, tuple[int, ...]]], window: int, biased: bool
) -> None:
    """To the bit; one row of a sequence, several, and guesses in a tree behind what is shared; some share less, or nothing."""
    family = Family(kind, members)
    q = queries(sum(family.rows), DIM)
    most = max(family.common)
    shared = torch.tensor([[0 if c < chunks else -1 for c in range(most)] for chunks in family.common])
    out, lse = family.attend(machine, q, window, biased, shared)
    apart = family.attend(machine, q, window, biased, torch.full_like(shared, -1))
    assert torch.equal(out, apart[0])
    assert torch.equal(lse, apart[1])
    wanted, sums = family.wanted(q, window, biased)
    near, mean = closeness(machine, kind)
    assert (out - wanted).abs().max() < near
    assert (out - wanted).abs().mean() < mean
    assert (lse - sums).abs().max() < near
