"""Block-sparse attention: each unit of rows sees, for each kv head, blocks of entries of its own choice.

Legend.  T: rows of the batch.  S: sequences.  H: query heads.  KV: kv heads.  G: query heads of one kv head.  D: head_dim.
U: units.  B: blocks of entries.  C: query tiles of a slab.  Q: query positions of a tile.  P: (query tile, key tile) pairs.
E: entries of a key tile.

A query tile of one kv head is a query tile of a model with a single one: its rows are (row, head) pairs, T * KV of them, and
`attention` computes them as it computes all others.  What is left out is left out as pairs: they are neither gathered nor
multiplied.  The pairs that stay have the shapes, the places in the tree of sums, and so the bits, that they have in dense
attention; where every block is visible the result is dense attention's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weft.ops.ref.attention import attention
from weft.ops.ref.attention_plan import AttentionPlan, Round, Slab

if TYPE_CHECKING:
    from weft.exec.kvpool import KVPool


def block_sparse_attention(
    q_THD: Tensor,
    pool: KVPool,
    layer: int,
    plan: AttentionPlan,
    visible_UKB: Tensor,
    block: int,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    out_THD: Tensor,
    want_lse: bool = False,
    want_mass: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """`attention` over those entries, of the ones that a row sees, whose block is visible to the row's unit and the kv head.

    plan         its units are rows of visible_UKB
    visible_UKB  bool [U, KV, B]; block j holds entries [j * block, (j + 1) * block), counted from the sequence's entry 0; B
                 reaches the end of every table
    A row that sees nothing gets zeros, and -inf for its log-sum-exp.  The rest is as for `attention`.
    """
    rows, heads, dim = q_THD.shape
    kv_heads = plan.kv_heads
    lse, mass = attention(
        q_THD.reshape(rows * kv_heads, heads // kv_heads, dim),
        pool,
        layer,
        _Visible(plan, visible_UKB, block),
        scale=scale,
        softcap=softcap,
        bias=bias,
        out_THD=out_THD.view(-1, heads // kv_heads, dim),
        want_lse=want_lse,
        want_mass=want_mass,
    )
    lse = None if lse is None else lse.view(rows, heads)
    return lse, None if mass is None else mass.view(plan.sequences, kv_heads, plan.entries)


@dataclass(slots=True, kw_only=True)
class _HeadSlab(Slab):
    """A slab's query tiles, each as often as there are kv heads: tile c * KV + head.  base: the slab itself."""

    base: Slab


class _Visible:
    """The visible pairs of a plan, as a plan of T * KV rows and S * KV sequences with one kv head each."""

    def __init__(self, plan: AttentionPlan, visible: Tensor, block: int) -> None:
        self.group, self.entries = plan.group, plan.entries
        self.kv_heads, self.sequences = 1, plan.sequences * plan.kv_heads
        self.slabs = [_by_head(slab, plan.kv_heads) for slab in plan.slabs]
        self._plan, self._visible, self._block = plan, visible, block

    def rounds(self, slab: _HeadSlab) -> Iterator[Round]:
        units = torch.from_numpy(slab.base.unit).to(self._visible.device)
        for part in self._plan.rounds(slab.base):
            chosen = self._chosen(part, units)
            if chosen is not None:
                yield chosen

    def _chosen(self, part: Round, units: Tensor) -> Round | None:
        """The visible pairs (query tile of one head, key tile) of a round; None where there are none."""
        heads, keys = self._plan.kv_heads, self._plan.tiling.keys
        seen = self._visible.index_select(0, units.index_select(0, part.tile))
        within: Tensor | None = None
        if self._block % keys == 0:
            index = torch.div(part.key * keys, self._block, rounding_mode="floor")
            whole = seen.gather(2, index[:, None, None].expand(-1, heads, 1)).squeeze(2)
        else:
            entry = part.key[:, None] * keys + torch.arange(keys, device=part.key.device)
            index = torch.div(entry, self._block, rounding_mode="floor").clamp_max_(seen.shape[2] - 1)
            within = seen.gather(2, index[:, None, :].expand(-1, heads, -1))
            whole = within.any(2)
        pair, head = whole.nonzero(as_tuple=True)
        if not pair.numel():
            return None
        hidden = part.hidden.index_select(0, pair)
        if within is not None:
            hidden |= ~within[pair, head][:, None, :]
        tile = part.tile.index_select(0, pair) * heads + head
        column = part.column.index_select(0, pair)
        entries = self.entries
        column = torch.where(
            column < 0, column, (column // entries * heads + head[:, None]) * entries + column % entries
        )
        return Round(
            tile=tile,
            cell=tile * part.width + part.cell.index_select(0, pair) % part.width,
            heads=part.heads[pair, head][:, None],
            entries=part.entries.index_select(0, pair),
            column=column,
            hidden=hidden,
            key=part.key.index_select(0, pair),
            width=part.width,
            one_to_one=False,
        )


def _by_head(slab: Slab, heads: int) -> _HeadSlab:
    """The query tiles of a slab, one for each kv head."""
    size = slab.rows.shape[1]
    each = torch.arange(heads, device=slab.rows.device)
    tile, slot = torch.div(slab.valid, size, rounding_mode="floor")[:, None], slab.valid[:, None] % size
    return _HeadSlab(
        rows=(slab.rows[:, None] * heads + each[:, None]).flatten(0, 1),
        valid=((tile * heads + each) * size + slot).flatten(),
        out_rows=(slab.out_rows[:, None] * heads + each).flatten(),
        positions=slab.positions.repeat_interleave(heads, 0),
        sequence=slab.sequence.repeat(heads),
        first=slab.first.repeat(heads),
        stop=slab.stop.repeat(heads),
        tree=None,
        unit=slab.unit.repeat(heads),
        base=slab,
    )
