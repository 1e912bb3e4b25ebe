"""Attention summed by entry, by the kernels and by the reference operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.harness import Rows
from tests.native.test_decoder import bench, prompt
from weft import native
from weft.exec.batch import MassRows

TOKENS = 170


def masses(ops: str, works: list[Rows], before: int, sums: list[int], **kw: Any) -> list[Tensor]:
    """By layer, what the entries get of rows that come after `before` tokens of each sequence; sums: of each row, -1 for none."""
    made = bench(ops, **kw)
    for work in works:
        if before:
            made.chunked(work.name, prompt(before, 3), 64)
    batch = made.batch(works)
    batch.mass = MassRows(torch.tensor(sums), max(sums) + 1)
    made.decoder.forward(batch, made.pool)
    return [batch.mass.found[layer] for layer in sorted(batch.mass.found)]


def some_rows(before: int) -> tuple[list[Rows], list[int]]:
    works = [Rows("a", prompt(TOKENS - before, 1), before), Rows("b", prompt(9, 2), before)]
    sums = [(i % 3) - 1 for i in range(TOKENS - before)] + [2, -1, 2, 3, 3, 3, 2, -1, 3]
    return works, sums


@pytest.mark.parametrize("isa", native.module().isas())
@pytest.mark.parametrize("before", [0, 64, 150])
def test_masses_are_those_of_the_reference(isa: str, before: int) -> None:
    works, sums = some_rows(before)
    wanted = masses("ref", works, before, sums)
    got = masses("cpu", works, before, sums, isa=isa)
    assert len(got) == 2
    for theirs, mine in zip(wanted, got, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    counted = torch.bincount(torch.tensor([s for s in sums if s >= 0]))
    rows = got[0].sum(2) / 2  # two query heads for each kv head, each of which gives the mass 1
    torch.testing.assert_close(rows, counted[:, None].expand(-1, 2).double(), atol=1e-4, rtol=0)


def test_sums_are_exact_whatever_the_threads_and_the_order() -> None:
    works, sums = some_rows(64)
    once = masses("cpu", works, 64, sums)
    assert all(torch.equal(a, b) for a, b in zip(once, masses("cpu", works, 64, sums, threads=3), strict=True))
    apart = [masses("cpu", works, 64, [s if s == one else -1 for s in sums]) for one in range(4)]
    for layer, whole in enumerate(once):
        for one in range(4):
            assert torch.equal(apart[one][layer][one], whole[one])
