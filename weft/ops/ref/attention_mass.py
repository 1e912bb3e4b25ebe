"""Who gets the attention: probabilities of chosen rows, summed by the entry that they fall on.

An operation of its own, whatever computes attention: it is what dense attention over the entries that stand would give.

Legend.  As in `attention.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from weft.ops.ref.attention import Partial, _finite, _merge_group, _merge_two, _queries, _scores
from weft.ops.ref.attention_plan import AttentionPlan, Round, Slab
from weft.ops.ref.tiles import Tiling

if TYPE_CHECKING:
    from weft.exec.batch import Batch, GroupBatch
    from weft.exec.kvpool import KVPool

QUANTA = 2.0**30
"""A probability is counted as a whole number of its parts, so that sums of many are exact in any order."""


@dataclass(slots=True)
class Weighed:
    """A round's pairs with rows that count.

    where   int64, the place of each weight in the sums, one beyond the last for those that count nowhere: [P * E] where the rows
            of each tile share a sum and are added up first, otherwise [P * Q * E]
    counts  bool [P, 1, Q, 1], rows that count; None where rows are told apart by `where`
    """

    part: Round
    where: Tensor
    counts: Tensor | None


class WeighingPlan:
    """Worked out once a step for one KV group: the tiles of sequences with rows that count, and where their weights go.

    The arguments are `AttentionPlan`'s.  batch.mass says which rows count.
    """

    def __init__(self, batch: Batch, where: GroupBatch, pool: KVPool, group: int, heads: int, tiling: Tiling) -> None:
        assert batch.mass is not None
        self.sums = batch.mass.count
        asked = (batch.mass.sums_T >= 0).cpu().numpy()
        only = np.array([asked[a:b].any() for a, b in itertools.pairwise(batch.bounds)], dtype=bool)
        self.tiles = AttentionPlan(batch, where, pool, group, heads, tiling, only=only)
        self.slabs: list[tuple[Slab, Tensor]] = []
        """With the sum [C, Q] of each row, -1 for none; only slabs in which some row counts."""
        for slab in self.tiles.slabs:
            own = torch.full_like(slab.rows, -1)
            own.view(-1)[slab.valid] = batch.mass.sums_T.index_select(0, slab.out_rows)
            if bool((own >= 0).any()):
                self.slabs.append((slab, own))
        self._kept: list[list[Weighed]] = [[] for _ in self.slabs]

    def parts(self, index: int) -> Iterator[Weighed]:
        """The pairs of a slab; kept for the next layer where the plan keeps its own."""
        if self._kept[index]:
            yield from self._kept[index]
            return
        slab, own = self.slabs[index]
        made: list[Weighed] = []
        for part in self.tiles.rounds(slab):
            weighed = self._weighed(part, own)
            if weighed is not None:
                if slab.kept:
                    made.append(weighed)
                yield weighed
        self._kept[index] = made

    def _weighed(self, part: Round, own: Tensor) -> Weighed | None:
        keep = (own >= 0).any(1).index_select(0, part.tile).nonzero().squeeze(1)
        if not keep.numel():
            return None
        if keep.numel() < part.tile.numel():
            names = ("tile", "cell", "heads", "entries", "column", "hidden", "key")
            chosen: dict[str, Any] = {name: getattr(part, name).index_select(0, keep) for name in names}
            part = replace(part, **chosen, one_to_one=False)
        mine = own.index_select(0, part.tile)
        first, counts = mine.amax(1, keepdim=True), mine >= 0
        shared = bool(((mine == first) | ~counts).all())
        sums = (first if shared else mine)[:, :, None]
        there = (sums >= 0) & (part.column >= 0)[:, None, :]
        where = (sums * self.tiles.entries + (part.column % self.tiles.entries)[:, None, :]).masked_fill_(
            ~there, self.sums * self.tiles.entries
        )
        return Weighed(part, where.flatten(), counts[:, None, :, None] if shared else None)


def attention_mass(
    q_THD: Tensor,
    pool: KVPool,
    layer: int,
    plan: WeighingPlan,
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
    tiles = plan.tiles
    size = plan.sums * tiles.entries
    mass = torch.zeros(size + 1, tiles.kv_heads, dtype=torch.float64, device=q_THD.device)
    for index, (slab, _) in enumerate(plan.slabs):
        query = _queries(q_THD, slab, tiles.kv_heads, scale)
        state: Partial | None = None
        last: tuple[Weighed, Tensor] | None = None
        rounds = 0
        for weighed in plan.parts(index):
            scores = _scores(query, pool, layer, tiles, weighed.part, softcap, bias)
            found = _totals(scores, weighed.part, slab)
            state = found if state is None else _merge_two(state, found)
            last, rounds = (weighed, scores), rounds + 1
        if state is None or last is None:
            continue
        norm = _finite(state.top + state.total.log())
        if rounds == 1:
            _add(mass, *last, norm)
            continue
        for weighed in plan.parts(index):
            _add(mass, weighed, _scores(query, pool, layer, tiles, weighed.part, softcap, bias), norm)
    return mass[:size].view(plan.sums, tiles.entries, tiles.kv_heads).transpose(1, 2).div(QUANTA)


def _totals(scores: Tensor, part: Round, slab: Slab) -> Partial:
    """Maxima and sums of exponentials of a round, merged into its tiles; values are not mixed."""
    flat = scores.flatten(2, 3)
    top = flat.amax(-1)
    total = (flat - _finite(top)[..., None]).exp_().sum(-1)
    return _merge_group(Partial(top, total, total.new_empty(*total.shape, 0)), part, slab)


def _add(mass: Tensor, weighed: Weighed, scores: Tensor, norm: Tensor) -> None:
    """Add a round's probabilities to mass [sums * entries + 1, KV].  scores [P, KV, Q, G, E], changed in place."""
    part = weighed.part
    scores -= (norm if part.one_to_one else norm.index_select(0, part.tile)).view(*scores.shape[:4], 1)
    weight = scores.exp_().mul_(QUANTA).round_()
    if weighed.counts is None:
        weight = weight.sum(3, dtype=torch.float64)
    else:
        weight = weight.mul_(weighed.counts[..., None]).sum((2, 3), dtype=torch.float64)[:, :, None]
    mass.index_add_(0, weighed.where, weight.permute(0, 2, 3, 1).reshape(-1, mass.shape[1]))
