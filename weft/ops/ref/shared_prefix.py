"""Attention of sequences whose tables begin with the same blocks: shared key tiles are computed once for all of them.

Legend.  T: rows of the batch.  S: sequences.  H: query heads.  KV: kv heads.  G: query heads of one kv head.  D: head_dim.
K: key tiles of a sequence.  C: query tiles of a slab.  Q: query positions of a tile.  R: rows of a slab.  P: pairs of a round.
E: entries of a key tile.  M: Q * G.

Rows of several sequences that read the same key tile are stacked into query tiles of their own: the tile is gathered once, and
its products are of matrices with matrices.  Each row then takes its part of the result to its own place in the tree of sums, and
is merged there as in dense attention.  Stacked tiles have row counts whose products agree (see `tiles.py`), so a row's bits are
dense attention's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from weft.ops.ref.attention import (
    NEGATIVE,
    Partial,
    _by_rows,
    _column_sums,
    _finite,
    _merge_two,
    _pairs,
    _queries,
    _tree_sum,
    attention,
)
from weft.ops.ref.attention_plan import CACHED_BYTES, AttentionPlan, Bools, Ints, Round, Slab
from weft.ops.ref.tiles import Tiling

if TYPE_CHECKING:
    from weft.exec.batch import Batch, GroupBatch
    from weft.exec.kvpool import KVPool


def shared_attention(
    q_THD: Tensor,
    pool: KVPool,
    layer: int,
    plan: SharedPlan,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    out_THD: Tensor,
    want_lse: bool = False,
    want_mass: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """What `attention` gives, bit for bit in the invariant mode; key tiles that the plan says are shared are read once."""
    lse, _ = attention(
        q_THD,
        pool,
        layer,
        plan.alone,
        scale=scale,
        softcap=softcap,
        bias=bias,
        out_THD=out_THD,
        want_lse=want_lse or want_mass,
    )
    for slab in plan.slabs:
        query = _queries(q_THD, slab, plan.kv_heads, scale)
        state: Partial | None = None
        for part in plan.parts(slab):
            found = _merge_rows(query, pool, layer, plan, slab, part, softcap, bias)
            state = found if state is None else _merge_two(state, found)
        assert state is not None, "a row sees at least itself"
        mixed = state.mixed.div_(state.total.clamp_min(1.0)[..., None])
        out_THD.index_copy_(0, slab.out_rows, mixed.to(out_THD.dtype))
        if lse is not None:
            lse.index_copy_(0, slab.out_rows, state.top + state.total.log())
    mass = None
    if want_mass:
        assert lse is not None
        mass = _column_sums(q_THD, lse, pool, layer, plan.plain, scale, softcap, bias)
    return (lse if want_lse else None), mass


@dataclass(slots=True)
class _Stack:
    """Rows of one or several sequences before P key tiles, as many for each.

    slots [P * Q]: of the slab's slots, those whose rows are stacked; some only fill up.  pairs: what they see.
    real: flat slots of the stack that hold a row.  cell: of each, row of the slab * width + key tile's index in its group.
    """

    slots: Tensor
    pairs: Round
    real: Tensor
    cell: Tensor


@dataclass(slots=True)
class _Part:
    """One group of key tiles of a slab."""

    stacks: list[_Stack]
    width: int
    spared: int
    held_bytes: int


def _merge_rows(
    query: Tensor,
    pool: KVPool,
    layer: int,
    plan: SharedPlan,
    slab: Slab,
    part: _Part,
    softcap: float | None,
    bias: Tensor | None,
) -> Partial:
    """One group of key tiles of each row: maximum and sum [R, H], mix of values [R, H, D]."""
    rows, width = slab.valid.numel(), part.width
    each = _by_rows(query, slab)
    heads, dim = each.shape[1:]
    kv_heads = query.shape[1]
    top = query.new_full((rows * width, heads, 1), NEGATIVE)
    total, mixed = query.new_zeros(rows * width, heads, 1), query.new_zeros(rows * width, heads, dim)
    for stack in part.stacks:
        pairs, size = stack.pairs.hidden.shape[:2]
        stacked = each.index_select(0, stack.slots).view(pairs, size, kv_heads, -1, dim).transpose(1, 2)
        stacked = stacked.reshape(pairs, kv_heads, -1, dim)
        found = _pairs(stacked, pool, layer, plan, stack.pairs, softcap, bias)
        for x, into in ((found.top[..., None], top), (found.total[..., None], total), (found.mixed, mixed)):
            split = x.view(pairs, kv_heads, size, -1, x.shape[-1]).transpose(1, 2).reshape(-1, heads, x.shape[-1])
            into.index_copy_(0, stack.cell, split.index_select(0, stack.real))
    best = top.view(rows, width, heads).amax(1)
    share = top.view(rows, width, heads).sub_(_finite(best)[:, None]).exp_().view(-1, heads, 1)
    total, mixed = _tree_sum(total.mul_(share), rows, width), _tree_sum(mixed.mul_(share), rows, width)
    return Partial(best, total.squeeze(-1), mixed)


class SharedPlan(AttentionPlan):
    """The tiles of sequences that share entries, and a plan of those that do not.

    shared_SK   int64: which sequences read the same memory in a key tile: equal numbers, in one column, where they do; -1 where a
                sequence is alone.  Key tiles are counted from a sequence's entry 0
    Only sequences whose rows fill one small query tile take part, and only with key tiles that stood whole before this step;
    everything else, and a number that stands only once, counts as -1.

    slabs   of the sequences that share something.   alone   plan of the others
    """

    def __init__(
        self,
        batch: Batch,
        where: GroupBatch,
        pool: KVPool,
        group: int,
        heads: int,
        tiling: Tiling,
        shared_SK: Ints,
        *,
        only: Bools | None = None,
    ) -> None:
        self._numbers = shared_SK
        self._parts: dict[tuple[int, int], _Part] = {}
        self._held_bytes = 0
        self._spared: dict[tuple[int, int], int] = {}
        self._plain: AttentionPlan | None = None
        self._given = (batch, where, pool, group, heads, tiling)
        super().__init__(*self._given, only=only)
        self.alone = AttentionPlan(*self._given, only=self._only & ~(self._numbers >= 0).any(1))

    @property
    def plain(self) -> AttentionPlan:
        """All the rows, without sharing."""
        if self._plain is None:
            self._plain = AttentionPlan(*self._given, only=self._only)
        return self._plain

    @property
    def saved(self) -> int:
        """Entries of one layer that were not read again, since another's read served; known once a layer has been computed."""
        return sum(self._spared.values())

    # ------------------------------------------------------------------------------------------ who shares

    def _cut(self, bounds: Ints, positions: Ints) -> list[Slab]:
        self._settle(bounds, positions)
        sharing = (self._numbers >= 0).any(1)
        if not sharing.any():
            return []
        # Those who share stand together, so that one slab has them all.
        first = np.where(sharing, (self._numbers >= 0).argmax(1), 0)
        family = self._numbers[np.arange(first.size), first]
        order = np.lexsort((family, ~sharing))[: int(sharing.sum())]
        sequence, within, entry = self._rows(bounds)
        rows = np.concatenate([np.arange(bounds[s], bounds[s + 1]) for s in order])
        small = self.tiling.decode
        return list(self._slabs(small, rows, sequence[rows], entry[rows], positions[rows], within[rows]))

    def _settle(self, bounds: Ints, positions: Ints) -> None:
        """Strike out every number that can't be used."""
        keys = self.tiling.keys
        chosen = np.flatnonzero(self._only & self._small())
        most = -(-int((self._first + self._lengths).max()) // keys)
        numbers = np.full((self.sequences, most), -1)
        width = min(most, self._numbers.shape[1])
        numbers[chosen, :width] = self._numbers[chosen, :width]
        if chosen.size:
            low = np.array([positions[bounds[s] : bounds[s + 1]].min() for s in chosen])
            high = np.array([positions[bounds[s] : bounds[s + 1]].max() for s in chosen])
            first, stop = self._key_tiles(chosen, low, high)
            first = np.maximum(first, -(-self._first[chosen] // keys))
            stood = (self._first + self._lengths - self._counts)[chosen]
            stop = np.minimum(stop, stood // keys)
            key = np.arange(most)
            seen = (key >= first[:, None]) & (key < stop[:, None])
            numbers[chosen] = np.where(seen, numbers[chosen], -1)
        place = np.flatnonzero(numbers.ravel() >= 0)
        names = numbers.ravel()[place] * most + place % most
        _, back, times = np.unique(names, return_inverse=True, return_counts=True)
        numbers.ravel()[place[times[back] < 2]] = -1
        self._numbers = numbers

    def _tiles_of_slab(self, size: int, owner: Ints, first: Ints, stop: Ints) -> int:
        """Pairs are cut to the scratch on their own: what a slab holds at once is its rows' cells."""
        filled = int(self._counts[owner].max())
        return max(1, self.tiling.scratch_bytes // (2 * self.tiling.group * filled * self._cell_bytes))

    # ------------------------------------------------------------------------------------------ stacks

    def parts(self, slab: Slab) -> Iterator[_Part]:
        """The slab's stacks, group of key tiles after group; groups are counted from a sequence's entry 0."""
        size = self.tiling.group
        for group in range(int(slab.first.min()) // size, (int(slab.stop.max()) - 1) // size + 1):
            name = id(slab), group
            part = self._parts.get(name)
            if part is None:
                tile, key = self._listed(slab, np.full(slab.first.size, group))
                if not tile.size:
                    continue
                part = self._part(slab, tile, key)
                self._spared[name] = part.spared
                if self._held_bytes + part.held_bytes <= CACHED_BYTES:
                    self._parts[name] = part
                    self._held_bytes += part.held_bytes
            yield part

    def _part(self, slab: Slab, tile: Ints, key: Ints) -> _Part:
        """The stacks of the given (query tile, key tile) pairs."""
        size, keys = slab.rows.shape[1], self.tiling.keys
        inside = key % self.tiling.group
        width = 1 << int(inside.max()).bit_length()
        row_of = np.full(slab.rows.numel(), -1)
        row_of[slab.valid.cpu().numpy()] = np.arange(slab.valid.numel())
        number = self._numbers[slab.sequence[tile], key]
        number = np.where(number < 0, -1 - np.arange(tile.size), number)
        slots = tile[:, None] * size + np.arange(size)
        cells = np.where(row_of[slots] >= 0, row_of[slots] * width + inside[:, None], -1)
        stacks, pieces, held = [], 0, 0
        for piece in self._pieces(slots, cells, key, number):
            stacks.append(self._stack(slab, *piece))
            pieces += piece[2].size
            held += keys * (piece[0].size + piece[2].size * 8 * (self.kv_heads + 2))
        return _Part(stacks, width, (tile.size - pieces) * keys, held)

    def _pieces(self, slots: Ints, cells: Ints, key: Ints, number: Ints) -> Iterator[tuple[Ints, Ints, Ints]]:
        """Rows before one key tile with one number, in stacks whose products agree and fit the scratch.

        Of pairs with slots [N, Q], cells (-1 where there is no row), key tiles and numbers [N], to the same for stacks: slots and
        cells [P, Q], key tiles [P].
        """
        order = np.lexsort((number, key))
        real = cells[order] >= 0
        pair = np.repeat(order, real.sum(1))
        slot, cell = slots[order][real], cells[order][real]
        turn = np.flatnonzero((np.diff(key[pair]) != 0) | (np.diff(number[pair]) != 0)) + 1
        heads = np.concatenate(([0], turn))
        counts = np.diff(np.concatenate((heads, [pair.size])))
        sizes = np.asarray(self.tiling.sizes)
        most = int(sizes[-1])
        inside = np.arange(pair.size) - np.repeat(heads, counts)
        cut = -(-counts // most)
        piece = np.repeat(np.cumsum(cut) - cut, counts) + inside // most
        fitting = sizes[np.searchsorted(sizes, np.bincount(piece))]
        for size in np.unique(fitting).tolist():
            room = max(1, self.tiling.scratch_bytes // (self._pair_bytes + size * self._row_bytes))
            chosen = np.flatnonzero(fitting == size)
            for at in range(0, chosen.size, room):
                some = chosen[at : at + room]
                mine = np.flatnonzero(np.isin(piece, some))
                place = np.searchsorted(some, piece[mine]), inside[mine] % most
                grid, into = np.full((2, some.size, size), -1)
                tiles = np.zeros(some.size, np.int64)
                grid[place], into[place], tiles[place[0]] = slot[mine], cell[mine], key[pair[mine]]
                yield np.where(grid < 0, grid[:, :1], grid), into, tiles

    def _stack(self, slab: Slab, slots: Ints, cells: Ints, key: Ints) -> _Stack:
        at, filler = self._tensor(slots.ravel()), self._tensor(cells < 0)
        positions = slab.positions.flatten().index_select(0, at).view(slots.shape).masked_fill(filler, -1)
        owner = slab.sequence[slots[:, 0] // slab.rows.shape[1]]
        pairs = self._seen(owner, key, positions)
        if slab.tree is not None:
            self._hide_strangers(pairs.hidden, np.where(cells < 0, -1, slab.tree.ravel()[slots]), owner, pairs.key)
        real = np.flatnonzero(cells.ravel() >= 0)
        return _Stack(at, pairs, self._tensor(real), self._tensor(cells.ravel()[real]))
