"""Who gets the attention: probabilities of chosen rows, summed by the entry that they fall on.

An operation of its own, whatever computes attention: it is what dense attention over the entries that stand would give.

Legend.  As in `attention.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from weft.ops.ref.attention import Partial, _finite, _merge_group, _merge_two, _queries, _scores
from weft.ops.ref.attention_plan import AttentionPlan, Round, Tiles
from weft.ops.ref.tiles import Tiling

if TYPE_CHECKING:
    from weft.exec.batch import Batch, GroupBatch, MassRows
    from weft.exec.kvpool import KVPool

QUANTA = 2.0**30
"""A probability is counted as a whole number of its parts, so that sums of many are exact in any order."""


def weighing_plan(
    batch: Batch, where: GroupBatch, pool: KVPool, group: int, heads: int, tiling: Tiling
) -> AttentionPlan:
    """The tiles of the sequences that have rows that count."""
    assert batch.mass is not None
    counts = (batch.mass.sums_T >= 0).cpu().numpy()
    only = np.array([counts[a:b].any() for a, b in itertools.pairwise(batch.bounds)], dtype=bool)
    return AttentionPlan(batch, where, pool, group, heads, tiling, only=only)


def attention_mass(
    q_THD: Tensor,
    pool: KVPool,
    layer: int,
    plan: Tiles,
    rows: MassRows,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention that each entry of a table got, summed over the rows that count and the heads of a kv head, float64
    [sums, KV, entries of the longest table].

    q_THD, scale, softcap, bias: as for `attention`.  Each probability is rounded to a whole number of 2 ** -30 first: float64
    then holds every sum exactly (of up to 2 ** 23 rows and heads), and it is the same however rows are cut into steps.
    """
    mass = torch.zeros(rows.count * plan.entries, plan.kv_heads, dtype=torch.float64, device=q_THD.device)
    for slab in plan.slabs:
        own = torch.full_like(slab.rows, -1)
        own.view(-1)[slab.valid] = rows.sums_T.index_select(0, slab.out_rows)
        counts = (own >= 0).any(1)
        if not counts.any():
            continue
        query = _queries(q_THD, slab, plan.kv_heads, scale)
        state: Partial | None = None
        for whole in plan.rounds(slab):
            if (part := _of_tiles(whole, counts)) is not None:
                scores = _scores(query, pool, layer, plan, part, softcap, bias).flatten(2, 3)
                top = scores.amax(-1)
                total = scores.sub_(_finite(top)[..., None]).exp_().sum(-1)
                found = _merge_group(Partial(top, total, total.new_empty(*total.shape, 0)), part, slab)
                state = found if state is None else _merge_two(state, found)
        if state is None:
            continue
        norm = _finite(state.top + state.total.log())
        for whole in plan.rounds(slab):
            if (part := _of_tiles(whole, counts)) is not None:
                scores = _scores(query, pool, layer, plan, part, softcap, bias)
                scores -= norm.index_select(0, part.tile).view(*scores.shape[:4], 1)
                weight = scores.exp_().mul_(QUANTA).round_().sum(3, dtype=torch.float64)
                _add(mass, weight, own.index_select(0, part.tile), part.column, plan.entries)
    return mass.view(rows.count, plan.entries, plan.kv_heads).transpose(1, 2).div(QUANTA)


def _of_tiles(part: Round, wanted: Tensor) -> Round | None:
    """The round's pairs whose query tile is wanted, bool [C]; None where there is none."""
    keep = wanted.index_select(0, part.tile).nonzero().squeeze(1)
    if keep.numel() == part.tile.numel():
        return part
    names = ("tile", "cell", "heads", "entries", "column", "hidden", "key")
    chosen = {name: getattr(part, name).index_select(0, keep) for name in names}
    return replace(part, **chosen, one_to_one=False) if keep.numel() else None


def _add(mass: Tensor, weight: Tensor, own: Tensor, column: Tensor, entries: int) -> None:
    """Add weights [P, KV, Q, E] to mass [sums * entries, KV]: row q of pair p to sum own[p, q], where there is one."""
    first, counts = own.amax(1), own >= 0
    weight = weight * counts[:, None, :, None]
    if bool(((own == first[:, None]) | ~counts).all()):  # one sum for each tile: its rows are added up first
        weight, own, counts = weight.sum(2, keepdim=True), first[:, None], (first >= 0)[:, None]
    where = own[:, :, None] * entries + (column % entries)[:, None, :]
    there = counts[:, :, None] & (column >= 0)[:, None, :]
    mass.index_add_(0, where[there], weight.permute(0, 2, 3, 1)[there])
