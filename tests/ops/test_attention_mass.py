"""Attention summed by entry, against the dense reference and against itself row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.test_attention import BLOCK, HEADS, KV_HEADS, SMALL, TILINGS, Held, World, plain
from weft.exec.batch import MassRows
from weft.ops.ref.attention_mass import QUANTA, WeighingPlan, attention_mass
from weft.ops.ref.tiles import Tiling


def mass_of(world: World, tiling: Tiling, rows: MassRows, softcap: float | None = None, bias: bool = False) -> Tensor:
    world.batch.mass = rows
    plan = WeighingPlan(world.batch, world.where, world.pool, 0, HEADS, tiling)
    given = {"softcap": softcap, "bias": world.bias if bias else None}
    found = attention_mass(world.q, world.pool, world.layer, plan, scale=0.7, **given)
    again = attention_mass(world.q, world.pool, world.layer, plan, scale=0.7, **given)
    assert torch.equal(found, again), "what is kept for the next layer is what was made for the first"
    return found


def each_sequence(world: World) -> MassRows:
    """Every row counts, in one sum for each sequence."""
    bounds = torch.tensor(world.batch.bounds)
    return MassRows(torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff()), len(bounds) - 1)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias", [False, True])
def test_matches_dense(tiling: str, softcap: float | None, bias: bool) -> None:
    world = World(plain())
    found = mass_of(world, TILINGS[tiling], each_sequence(world), softcap, bias)
    torch.testing.assert_close(found.float(), world.dense(softcap, bias)[2], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tiling", TILINGS)
def test_compressed_tables_and_trees(tiling: str) -> None:
    kept = [0, 1, 2, 7, 19, 20, 33, 34, 40, 41]
    tree = Held([*range(33), 33, 33, 34, 34, 34, 35], 9, parents=(2, 2, 3, 3, 4, 7))
    world = World([Held([*kept, *range(60, 67)], 7), tree, Held([*kept, 90], 1)])
    found = mass_of(world, TILINGS[tiling], each_sequence(world))
    torch.testing.assert_close(found.float(), world.dense()[2], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tiling", TILINGS)
def test_sums_of_some_rows_are_exact(tiling: str) -> None:
    """Some rows share a sum, some have one of their own, some count in none: each sum is that of its rows, to the bit."""
    world = World(plain())
    rows = each_sequence(world)
    rows.sums_T[5:9] = -1
    rows.sums_T[world.batch.bounds[3] :] = torch.tensor([3, 3, -1, 3, 3, 3, 3, 3, 3, 3, 5, 6, 7, -1, 4])
    rows.count = 8
    wanted = torch.zeros(8, KV_HEADS, world.where.tables_SB.shape[1] * BLOCK, dtype=torch.float64)
    for at, own in enumerate(rows.sums_T.tolist()):
        if own >= 0:
            only = MassRows(torch.full_like(rows.sums_T, -1), 1)
            only.sums_T[at] = 0
            alone = mass_of(world, TILINGS[tiling], only)
            assert alone.sum(-1).allclose(torch.tensor(HEADS / KV_HEADS, dtype=torch.float64))
            assert torch.equal(alone * QUANTA, (alone * QUANTA).round())
            wanted[own] += alone[0]
    assert torch.equal(mass_of(world, TILINGS[tiling], rows), wanted)


def test_nobody_counts() -> None:
    world = World(plain())
    rows = MassRows(torch.full((world.batch.bounds[-1],), -1), 1)
    assert not mass_of(world, SMALL, rows).any()
