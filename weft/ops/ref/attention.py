"""Paged attention by tiles, merged by log-sum-exp: the specification of every attention here.

Legend.  T: rows of the batch.  H: query heads.  KV: key/value heads.  G: query heads of one kv head, H / KV.  D: head_dim.
C: query tiles of a slab.  Q: query positions of a tile.  P: (query tile, key tile) pairs of a round.  E: entries of a key
tile.  M: Q * G rows of a tile's products.

Every pair computes scores, their maximum, the sum of their exponentials and the mix of values on its own.  Pairs of one query
tile are merged within groups of key tiles (a tree over the tile's index within the group) and then group after group.  Key
tiles and groups begin at absolute entries, and a pair that a row sees nothing of adds exact zeros: so a row's bits depend on the
entries that it sees and on nothing else, as long as the products do not (see `tiles.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weft.ops.ref.attention_plan import Round, Slab, Tiles
from weft.ops.ref.basic import softcap_

if TYPE_CHECKING:
    from weft.exec.kvpool import KVPool

NEGATIVE = -math.inf


@dataclass(slots=True)
class Partial:
    """Unfinished softmax of C tiles: maximum and sum [C, KV, M], mix of values [C, KV, M, D]; all float32."""

    top: Tensor
    total: Tensor
    mixed: Tensor


def attention(
    q_THD: Tensor,
    pool: KVPool,
    layer: int,
    plan: Tiles,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    out_THD: Tensor,
    want_lse: bool = False,
    want_mass: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """out = softmax(scale * q k^T) v over the entries that each row sees, in float32 inside.

    q_THD   queries after rope; may be strided.   out_THD   [>= T, H, D], contiguous; rows of the batch are written
    bias    float32 [blocks, block_tokens], added to every score of the entry (log-weights of merged entries), or None
    Returns (lse, mass): log-sum-exp of each row's scores, float32 [T, H]; and the attention that each entry of each table got,
    summed over rows and the heads of a kv head, float32 [S, KV, entries]; each None unless wanted.
    """
    rows, heads = q_THD.shape[:2]
    lse = q_THD.new_zeros(rows, heads, dtype=torch.float32) if want_lse or want_mass else None
    for slab in plan.slabs:
        query = _queries(q_THD, slab, plan.kv_heads, scale)
        state: Partial | None = None
        for part in plan.rounds(slab):
            found = _merge_group(_pairs(query, pool, layer, plan, part, softcap, bias), part, slab)
            state = found if state is None else _merge_two(state, found)
        if state is None:
            state = _nothing(query)
        mixed = state.mixed.div_(state.total.clamp_min(1.0)[..., None])
        flat = _by_rows(mixed, slab)
        out_THD.index_copy_(0, slab.out_rows, flat.index_select(0, slab.valid).to(out_THD.dtype))
        if lse is not None:
            sums = _by_rows((state.top + state.total.log())[..., None], slab)
            lse.index_copy_(0, slab.out_rows, sums.index_select(0, slab.valid).squeeze(-1))
    mass = None
    if want_mass:
        assert lse is not None
        mass = _column_sums(q_THD, lse, pool, layer, plan, scale, softcap, bias)
    return (lse if want_lse else None), mass


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of entries, from the results over each.

    outs [T, H, D] and lses [T, H] of each set (-inf where a row sees none of it) -> (out, lse), float32.
    """
    lse = torch.stack(lses)
    top = lse.amax(0)
    weight = (lse - top.masked_fill(top == NEGATIVE, 0.0)).exp_()
    total = weight.sum(0)
    out = sum(w[..., None] * o.float() for w, o in zip(weight, outs, strict=True))
    assert isinstance(out, Tensor)
    return out / total.clamp_min(torch.finfo(torch.float32).tiny)[..., None], top + total.log()


def _queries(q_THD: Tensor, slab: Slab, kv_heads: int, scale: float) -> Tensor:
    """Scaled queries of a slab's tiles, float32 [C, KV, M, D]; slots that stand for no row hold some other row."""
    tiles, size = slab.rows.shape
    heads, dim = q_THD.shape[1:]
    q = q_THD.index_select(0, slab.rows.flatten()).float()
    q = q.view(tiles, size, kv_heads, heads // kv_heads, dim).permute(0, 2, 1, 3, 4)
    return (q * scale).reshape(tiles, kv_heads, -1, dim)


def _by_rows(x: Tensor, slab: Slab) -> Tensor:
    """[C, KV, M, D] -> [C * Q, H, D]."""
    tiles, size = slab.rows.shape
    kv_heads, inner, dim = x.shape[1:]
    split = x.view(tiles, kv_heads, size, inner // size, dim).permute(0, 2, 1, 3, 4)
    return split.reshape(tiles * size, -1, dim)


def _scores(
    query: Tensor,
    pool: KVPool,
    layer: int,
    plan: Tiles,
    part: Round,
    softcap: float | None,
    bias: Tensor | None,
) -> Tensor:
    """Masked scores of a round, [P, KV, Q, G, E]."""
    q = query if part.one_to_one else query.index_select(0, part.tile)
    k = pool.gather(plan.group, layer, False, part.heads)
    pairs, kv_heads, rows, dim = q.shape
    scores = torch.bmm(q.reshape(-1, rows, dim), k.flatten(0, 1).transpose(1, 2))
    if softcap is not None:
        softcap_(scores, softcap)
    size = part.hidden.shape[1]
    scores = scores.view(pairs, kv_heads, size, rows // size, -1)
    if bias is not None:
        scores += bias.flatten().index_select(0, part.entries.flatten()).view(pairs, 1, 1, 1, -1)
    return scores.masked_fill_(part.hidden[:, None, :, None, :], NEGATIVE)


def _pairs(
    query: Tensor,
    pool: KVPool,
    layer: int,
    plan: Tiles,
    part: Round,
    softcap: float | None,
    bias: Tensor | None,
) -> Partial:
    """Each pair of a round on its own: partial results of P pairs."""
    scores = _scores(query, pool, layer, plan, part, softcap, bias)
    pairs, kv_heads = scores.shape[:2]
    scores = scores.flatten(2, 3)
    top = scores.amax(-1)
    weight = scores.sub_(_finite(top)[..., None]).exp_()
    total = weight.sum(-1)
    v = pool.gather(plan.group, layer, True, part.heads)
    mixed = torch.bmm(weight.flatten(0, 1), v.flatten(0, 1))
    return Partial(top, total, mixed.view(pairs, kv_heads, -1, v.shape[-1]))


def _nothing(query: Tensor) -> Partial:
    """The state of tiles that have seen nothing."""
    empty = query.new_zeros(query.shape[:-1])
    return Partial(torch.full_like(empty, NEGATIVE), empty, torch.zeros_like(query))


def _finite(top: Tensor) -> Tensor:
    """Maxima with -inf (a row that sees nothing) replaced by 0, so that differences stay defined."""
    return top.masked_fill(top == NEGATIVE, 0.0)


def _merge_group(found: Partial, part: Round, slab: Slab) -> Partial:
    """Merge a round's pairs [P, ...] into its tiles [C, ...]: one maximum, then a tree of sums over the key tile's index."""
    if part.width == 1 and part.one_to_one:
        return found
    tiles, width = slab.rows.shape[0], part.width
    shape = found.mixed.shape[1:]
    top = found.top.new_full((tiles * width, *shape[:2]), NEGATIVE).index_copy_(0, part.cell, found.top)
    top = top.view(tiles, width, *shape[:2])
    best = top.amax(1)
    share = (top - _finite(best)[:, None]).exp_()
    mine = share.view(tiles * width, *shape[:2]).index_select(0, part.cell)
    total = found.total.new_zeros(tiles * width, *shape[:2]).index_copy_(0, part.cell, found.total * mine)
    mixed = found.mixed.new_zeros(tiles * width, *shape).index_copy_(0, part.cell, found.mixed.mul_(mine[..., None]))
    return Partial(best, _tree_sum(total, tiles, width), _tree_sum(mixed, tiles, width))


def _tree_sum(x: Tensor, tiles: int, width: int) -> Tensor:
    """[tiles * width, ...] -> [tiles, ...]: neighbours are added until one is left; more zeros at the end change nothing."""
    x = x.view(tiles, width, *x.shape[1:])
    while x.shape[1] > 1:
        x = x[:, 0::2] + x[:, 1::2]
    return x[:, 0]


def _merge_two(a: Partial, b: Partial) -> Partial:
    """Merge the state of earlier groups with the next group."""
    top = torch.maximum(a.top, b.top)
    safe = _finite(top)
    left, right = (a.top - safe).exp_(), (b.top - safe).exp_()
    mixed = a.mixed * left[..., None] + b.mixed * right[..., None]
    return Partial(top, a.total * left + b.total * right, mixed)


def _column_sums(
    q_THD: Tensor,
    lse_TH: Tensor,
    pool: KVPool,
    layer: int,
    plan: Tiles,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
) -> Tensor:
    """Attention that each entry of each table got, float32 [S, KV, entries]."""
    mass = lse_TH.new_zeros(plan.sequences * plan.entries, plan.kv_heads)
    for slab in plan.slabs:
        query = _queries(q_THD, slab, plan.kv_heads, scale)
        norm = _finite(_queries(lse_TH[..., None], slab, plan.kv_heads, 1.0))
        real = torch.zeros(slab.rows.numel(), dtype=torch.bool, device=q_THD.device)
        real[slab.valid] = True
        for part in plan.rounds(slab):
            scores = _scores(query, pool, layer, plan, part, softcap, bias)
            pairs, kv_heads, size, inner, keys = scores.shape
            sums = norm.index_select(0, part.tile).view(pairs, kv_heads, size, inner, 1)
            weight = scores.sub_(sums).exp_()
            weight *= real.view(-1, size).index_select(0, part.tile).view(pairs, 1, size, 1, 1)
            column = weight.sum((2, 3)).transpose(1, 2).reshape(pairs * keys, kv_heads)
            mine = part.column.flatten()
            mass.index_add_(0, mine.clamp_min(0), column.masked_fill_((mine < 0)[:, None], 0.0))
    return mass.view(plan.sequences, plan.entries, plan.kv_heads).transpose(1, 2).contiguous()
