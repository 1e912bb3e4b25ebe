"""Attention of guesses in a tree, and what entries get of it, in every instruction set and over all stored rows."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tests.native.machine import HALVES, ISAS, MODULE, Machine
from tests.native.test_attention import STORES, Stored, closeness, queries

DIM = 64
SMALL = (-1, 0, 0, 1, -1, 4, 2)
CHAIN = tuple(range(-1, 63))
"""All of the guesses that bits can tell apart, each behind the one before it."""
BUSHY = tuple(random.Random(3).randrange(-1, guess) if guess else -1 for guess in range(64))
CASES = [
    (150, SMALL, 1, 0), (150, SMALL, 1, 4), (131, SMALL, 10, 0), (67, SMALL, 3, 40), (131, CHAIN, 64, 0), (150, CHAIN, 70, 20),
    (200, BUSHY, 66, 0), (200, BUSHY, 1, 33), (64, BUSHY, 64, 0),
]  # fmt: skip
"""Entries, the tree at their end, rows (the last ones; guesses before these were computed in an earlier pass), window."""


def some_bias(stored: Stored) -> Tensor:
    """Of merged entries, and of some of the context that are not there."""
    make = torch.Generator().manual_seed(5)
    bias = torch.randint(1, 9, (stored.entries,), generator=make).float().log()
    gone = torch.randperm(stored.entries, generator=make)[: stored.entries // 3]
    bias[gone[gone < stored.entries - len(stored.tree)]] = float("-inf")
    return bias


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize(("entries", "tree", "rows", "window"), CASES)
def test_each_row_sees_its_own_branch(
    machine: Machine, kind: str, entries: int, tree: tuple[int, ...], rows: int, window: int
) -> None:
    """With biases and without; and a row alone has the bits that it has in company."""
    stored, q = Stored(kind, entries, DIM, tree), queries(rows, DIM)
    where = stored.where(rows)
    most, mean = closeness(machine, kind)
    for bias in (None, some_bias(stored)):
        out, lse = stored.attend_and_sum(machine, q, where, window, bias=bias)
        wanted, sums = stored.wanted_and_sum(q, where, window, bias=bias)
        assert (out - wanted).abs().max() < most
        assert (out - wanted).abs().mean() < mean
        assert (lse - sums).abs().max() < most
        for row in {0, rows // 2, rows - 1}:
            alone = stored.attend_and_sum(machine, q[row : row + 1].clone(), where[row : row + 1], window, bias=bias)
            assert torch.equal(alone[0][0], out[row])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize(
    ("entries", "tree", "rows", "window"), [*CASES, (150, (), 9, 0), (150, (), 1, 70), (1, (), 1, 0)]
)
def test_what_entries_get_of_rows_that_count(
    isa: str, kind: str, entries: int, tree: tuple[int, ...], rows: int, window: int
) -> None:
    """Queries are rounded as attention itself rounds them: to bfloat16 where the instruction set multiplies such rows."""
    stored, q = Stored(kind, entries, DIM, tree), queries(rows, DIM)
    where = stored.where(rows)
    sums = torch.tensor([0, 2, -1, 0, 1])[torch.arange(rows) % 5]
    machines = [Machine(MODULE.Program(threads, isa)) for threads in (1, 3)]
    rounded = kind == "bfloat16" and isa in HALVES
    read = q.bfloat16().float() if rounded else q
    most, mean = closeness(machines[0], "float32" if rounded else kind)
    for bias in (None, some_bias(stored)):
        found = stored.weigh(machines[0], q, where, sums, window, bias)
        assert torch.equal(found, stored.weigh(machines[1], q, where, sums, window, bias))
        weights = torch.softmax(stored.scores(read, where, window, 0.0, bias), -1).sum(2)
        wanted = torch.zeros_like(found).index_add_(0, sums[sums >= 0], weights[sums >= 0])
        assert (found - wanted).abs().max() < most
        assert (found - wanted).abs().mean() < mean
        assert (found[wanted == 0] == 0).all(), "of what no row sees"
