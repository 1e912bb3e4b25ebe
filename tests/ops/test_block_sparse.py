"""Block-sparse attention against a softmax over masks, written row by row, and against dense attention bit by bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.test_attention import BLOCK, DIM, HEADS, KV_HEADS, TILINGS, Held, World, plain
from weft.ops import IMPLEMENTATIONS, choose
from weft.ops.ref.attention_plan import AttentionPlan
from weft.ops.ref.tiles import Tiling, invariant_tiling

BLOCKS = (3, 8, 16)
"""Of entries: no multiple of a key tile, a multiple of some, of others."""


def units_of(world: World, rows: int) -> np.ndarray:
    """Every `rows` rows of a sequence are a unit of their own."""
    counts = np.diff(world.batch.bounds)
    parts = [np.arange(c) // rows for c in counts]
    starts = np.cumsum([0, *(p[-1] + 1 for p in parts[:-1])])
    return np.concatenate([p + s for p, s in zip(parts, starts, strict=True)])


def pattern(world: World, units: np.ndarray, block: int, share: float) -> Tensor:
    """A random choice of blocks, bool [U, KV, B]."""
    count = -(-max(s.first + len(s.positions) + BLOCK for s in world.sequences) // block)
    generator = torch.Generator().manual_seed(block)
    return torch.rand(int(units.max()) + 1, KV_HEADS, count, generator=generator) < share


def sparse(
    world: World, tiling: Tiling, units: np.ndarray, visible: Tensor, block: int, ops: str = "ref", **kw: object
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    plan = AttentionPlan(world.batch, world.where, world.pool, 0, HEADS, tiling, units=units)
    out = torch.full_like(world.q, math.nan)
    run = choose(ops).block_sparse_attention
    lse, mass = run(world.q, world.pool, world.layer, plan, visible, block, scale=0.7, out_THD=out, **kw)
    return out, lse, mass


def masked(
    world: World, units: np.ndarray, visible: Tensor, block: int, softcap: float | None, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and column sums by a mask over all scores."""
    out, lse = torch.zeros(world.q.shape), torch.full(world.q.shape[:2], -math.inf)
    mass = torch.zeros(len(world.sequences), KV_HEADS, world.where.tables_SB.shape[1] * BLOCK)
    for s, sequence in enumerate(world.sequences):
        weights = world.bias[world.where.tables_SB[s]].flatten()
        for row in range(sequence.rows):
            at = world.batch.bounds[s] + row
            for head in range(HEADS):
                kv = head // (HEADS // KV_HEADS)
                chosen = visible[units[at], kv]
                seen = [e for e in world.visible(sequence, row) if chosen[(sequence.first + e) // block]]
                if not seen:
                    continue
                scores = 0.7 * world.keys[s][:, kv] @ world.q[at, head].float()
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if bias:
                    scores = scores + weights[: len(scores)]
                mask = torch.full_like(scores, -math.inf)
                mask[seen] = 0.0
                share = torch.softmax(scores + mask, 0)
                out[at, head] = share @ world.values[s][:, kv]
                lse[at, head] = torch.logsumexp(scores + mask, 0)
                mass[s, kv, : len(share)] += share
    return out, lse, mass


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("softcap", "bias", "window"), [(None, False, None), (1.5, True, None), (None, False, 6)])
def test_matches_a_masked_softmax(
    ops: str, tiling: str, block: int, softcap: float | None, bias: bool, window: int | None
) -> None:
    world = World(plain(), window)
    units = units_of(world, 6)
    visible = pattern(world, units, block, 0.5)
    given = world.bias if bias else None
    found = sparse(
        world, TILINGS[tiling], units, visible, block, ops, softcap=softcap, bias=given, want_lse=True, want_mass=True
    )
    for mine, wanted in zip(found, masked(world, units, visible, block, softcap, bias), strict=True):
        torch.testing.assert_close(mine, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tiling", TILINGS)
def test_compressed_tables_dropped_heads_and_trees(tiling: str) -> None:
    """Blocks are counted in entries, whatever their positions are; guesses still see only ancestors."""
    kept = [0, 1, 2, 7, 19, 20, 33, 34, 40, 41]
    compressed = Held([*kept, *range(60, 67)], 7)
    slid = Held(list(range(12, 50)), 9, first=12)
    tree = Held([*range(33), 33, 33, 34, 34, 34, 35], 9, parents=(2, 2, 3, 3, 4, 7))
    world = World([compressed, slid, tree])
    units = units_of(world, 4)
    visible = pattern(world, units, 8, 0.6)
    found = sparse(world, TILINGS[tiling], units, visible, 8, want_lse=True, want_mass=True)
    for mine, wanted in zip(found, masked(world, units, visible, 8, None, False), strict=True):
        torch.testing.assert_close(mine, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_everything_visible_is_dense_attention_to_the_bit(block: int) -> None:
    tiling = invariant_tiling(HEADS // KV_HEADS, DIM, torch.device("cpu"))
    world = World([*plain(), Held(list(range(300)), 150)])
    units = units_of(world, 16)
    visible = pattern(world, units, block, 2.0)
    found = sparse(world, tiling, units, visible, block, want_lse=True, want_mass=True)
    dense = world.run(tiling, want_lse=True, want_mass=True)
    assert torch.equal(found[0], dense[0])
    assert torch.equal(found[1], dense[1])
    torch.testing.assert_close(found[2], dense[2], atol=1e-6, rtol=1e-6)


def test_a_unit_does_not_depend_on_the_others() -> None:
    """Rows of a unit give the same bits alone and among others."""
    tiling = invariant_tiling(HEADS // KV_HEADS, DIM, torch.device("cpu"))
    world = World([Held(list(range(150)), 64), Held(list(range(90)), 90)])
    units = units_of(world, 16)
    visible = pattern(world, units, 16, 0.4)
    out = sparse(world, tiling, units, visible, 16)[0]
    fewer = World([Held(list(range(150)), 64), Held(list(range(90)), 90)])
    keep = slice(0, 64)
    fewer.batch.bounds, fewer.q = [0, 64, 64], world.q[keep]
    fewer.batch.positions_T = world.batch.positions_T[keep]
    assert torch.equal(sparse(fewer, tiling, units[keep], visible, 16)[0], out[keep])


def test_pairs_that_nobody_sees_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is the visible pairs': what is gathered and multiplied falls with them."""
    from weft.ops.ref import attention as module

    world = World([Held(list(range(512)), 256)])
    units = units_of(world, 16)
    counted: list[int] = []
    inner = module._pairs

    def count(query: Tensor, pool, layer, plan, part, *rest):  # type: ignore[no-untyped-def]
        counted.append(part.heads.shape[0] * part.heads.shape[1])
        return inner(query, pool, layer, plan, part, *rest)

    monkeypatch.setattr(module, "_pairs", count)
    tiling, sums = Tiling(decode=4, prefill=16, keys=16, group=4), []
    for share in (2.0, 0.25):
        counted.clear()
        sparse(world, tiling, units, pattern(world, units, 16, share), 16)
        sums.append(sum(counted))
    assert sums[0] == KV_HEADS * sum(-(-(256 + 16 * (i + 1)) // 16) for i in range(16))
    assert 0.15 * sums[0] < sums[1] < 0.35 * sums[0]
