"""Attention over shared key tiles is dense attention: to the bit where products agree, within rounding elsewhere."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.test_attention import BLOCK, DIM, HEADS, KV_HEADS, TILINGS, Held, World
from weft.ops import IMPLEMENTATIONS, choose
from weft.ops.ref.shared_prefix import SharedPlan
from weft.ops.ref.tiles import Tiling, invariant_tiling


def family(seed: int, count: int, longest: int, *, window: int | None = None, rows: int = 1) -> World:
    """Sequences of a random tree: each begins with blocks of an earlier one, and then goes its own way."""
    rng = random.Random(seed)
    lengths, parents = [longest], [(-1, 0)]
    for child in range(1, count):
        parent = rng.randrange(-1, child)
        whole = (lengths[parent] - 1) // BLOCK
        common = rng.randrange(whole // 2, whole + 1) if parent >= 0 else 0
        lengths.append(common * BLOCK + rng.randrange(rows, longest // 5))
        parents.append((parent, common))
    world = World([Held(list(range(n)), min(rng.randrange(1, rows + 1), n)) for n in lengths], window)
    tables = world.where.tables_SB
    for child, (parent, common) in enumerate(parents):
        if parent >= 0:
            common = min(common, (lengths[parent] - world.sequences[parent].rows) // BLOCK)
            common = min(common, (lengths[child] - world.sequences[child].rows) // BLOCK)
            tables[child, :common] = tables[parent, :common]
            for side in (world.keys, world.values):
                side[child][: common * BLOCK] = side[parent][: common * BLOCK]
    return world


def numbers(world: World, keys: int) -> np.ndarray:
    """Who reads the same blocks in a key tile, by comparing every table with every other."""
    most = -(-int(world.where.lengths_S.max()) // keys)
    found = np.full((len(world.sequences), most), -1)
    for k in range(most):
        for s, table in enumerate(world.where.tables_SB.tolist()):
            if (k + 1) * keys <= int(world.where.lengths_S[s]):
                part = table[k * keys // BLOCK : -(-(k + 1) * keys // BLOCK)]
                for other in range(s + 1):
                    if world.where.tables_SB[other].tolist()[k * keys // BLOCK : -(-(k + 1) * keys // BLOCK)] == part:
                        found[s, k] = other
                        break
    return found


def together(
    world: World, tiling: Tiling, shared: np.ndarray, ops: str = "ref", **kw: object
) -> tuple[Tensor, Tensor | None, Tensor | None, SharedPlan]:
    plan = SharedPlan(world.batch, world.where, world.pool, 0, HEADS, tiling, shared)
    out = torch.full_like(world.q, math.nan)
    lse, mass = choose(ops).shared_attention(world.q, world.pool, world.layer, plan, scale=0.7, out_THD=out, **kw)
    return out, lse, mass, plan


@pytest.fixture(scope="module")
def invariant() -> Tiling:
    return invariant_tiling(HEADS // KV_HEADS, DIM, torch.device("cpu"))


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("window", "softcap", "bias"), [(None, None, False), (150, None, False), (None, 1.5, True)])
def test_equal_to_plain_attention(
    ops: str, seed: int, window: int | None, softcap: float | None, bias: bool, invariant: Tiling
) -> None:
    world = family(seed, 14, 330, window=window)
    given = {"softcap": softcap, "bias": world.bias if bias else None, "want_lse": True, "want_mass": True}
    out, lse, mass, plan = together(world, invariant, numbers(world, invariant.keys), ops, **given)
    plain = world.run(invariant, **given)
    assert torch.equal(out, plain[0])
    assert torch.equal(lse, plain[1])
    assert torch.equal(mass, plain[2])
    assert plan.saved > 0


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("window", [None, 400])
def test_matches_dense_under_any_tiling(tiling: str, window: int | None) -> None:
    """Several rows of a sequence in one small tile, prompts beside them, and tilings whose products do not agree."""
    world = family(3, 12, 700, window=window, rows=2)
    roomy = replace(TILINGS[tiling], scratch_bytes=1 << 20)
    out, lse, _, plan = together(world, roomy, numbers(world, roomy.keys), want_lse=True)
    wanted = world.dense()
    torch.testing.assert_close(out, wanted[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(lse, wanted[1], atol=2e-5, rtol=1e-5)
    assert plan.saved > 0


def test_guesses_in_a_tree(invariant: Tiling) -> None:
    """Sequences that verify trees share what stood before; a tile of 16 rows takes the rows of a whole tree."""
    tree = (0, 0, 1, 3)
    positions = [*range(200), 200, 200, 201, 202]
    wide = Tiling(decode=16, prefill=16, keys=64)
    world = World([Held(positions, 5, parents=tree), Held(list(range(201)), 1), Held(positions, 5, parents=tree)])
    world.where.tables_SB[1:, :48] = world.where.tables_SB[0, :48]
    for side in (world.keys, world.values):
        for s in (1, 2):
            side[s][:192] = side[0][:192]
    out, _, _, plan = together(world, wide, numbers(world, 64))
    assert torch.equal(out, world.run(wide)[0])
    torch.testing.assert_close(out, world.dense()[0], atol=2e-5, rtol=1e-5)
    assert plan.saved == 3 * 2 * 64  # three key tiles, each read once instead of three times


def test_each_shared_tile_is_read_once(monkeypatch: pytest.MonkeyPatch, invariant: Tiling) -> None:
    """Eight forks before five shared tiles: five reads of these instead of forty."""
    from weft.ops.ref import shared_prefix as module

    world = World([Held(list(range(330)), 1) for _ in range(8)])
    world.where.tables_SB[1:, :80] = world.where.tables_SB[0, :80]
    counted: list[int] = []
    inner = module._pairs

    def count(query: Tensor, pool, layer, plan, part, *rest):  # type: ignore[no-untyped-def]
        counted.append(part.heads.shape[0])
        return inner(query, pool, layer, plan, part, *rest)

    monkeypatch.setattr(module, "_pairs", count)
    plan = together(world, invariant, numbers(world, 64))[3]
    assert sum(counted) == 5 + 8  # and each has a tile of its own
    assert plan.saved == 5 * 64 * 7


def test_numbers_that_cannot_be_used_are_struck_out(invariant: Tiling) -> None:
    """A number that stands once, a tile that is being written, rows of a prompt: nothing is shared, and the result is plain."""
    world = World([Held(list(range(128)), 1), Held(list(range(128)), 1), Held(list(range(200)), 40)])
    shared = np.array([[7, 1, -1], [3, 1, -1], [7, 5, 2]])
    out, _, _, plan = together(world, invariant, shared)
    assert plan.slabs == []
    assert plan.saved == 0
    assert torch.equal(out, world.run(invariant)[0])


def test_scratch_is_bounded(invariant: Tiling) -> None:
    """Little scratch means many slabs and short stacks, and the same bits."""
    world = family(1, 20, 330, rows=2)
    tight = Tiling(invariant.decode, invariant.prefill, invariant.keys, scratch_bytes=1, stacked=invariant.stacked)
    mine, wide = together(world, tight, numbers(world, 64)), together(world, invariant, numbers(world, 64))
    assert len(mine[3].slabs) > len(wide[3].slabs)
    assert torch.equal(mine[0], wide[0])
    assert torch.equal(mine[0], world.run(invariant)[0])
