"""Cutting a batch's attention in one KV group into tiles: worked out once a step, used by every layer of the group.

Legend.  T: rows of the batch.  S: sequences.  C: query tiles of a slab.  Q: query positions of a tile.  E: entries of a key
tile.  P: (query tile, key tile) pairs of a round.  KV: kv heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from weft.ops.ref.tiles import Tiling

if TYPE_CHECKING:
    from weft.exec.batch import Batch, GroupBatch
    from weft.exec.kvpool import KVPool

Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

CACHED_BYTES = 16 << 20
"""Rounds are kept for the next layer while all of them stay below this size, and made anew for each layer beyond it."""


@dataclass(slots=True)
class Round:
    """The pairs of a slab whose key tiles are in the same group, counted from each query tile's first.

    tile    [P], the pair's query tile in the slab.  cell [P]: tile * width + key tile's index in its group
    heads   [P, KV, E], where the first layer's keys of a head are: row of memory * KV + head.  Entries beyond the sequence
            stand for its last one: what was never written, even NaN, is never read, and a weight of 0 hides the rest
    entries [P, E], block * block_tokens + offset.  column [P, E]: sequence * entries + entry, -1 where there is none
    hidden  [P, Q, E], true where the query does not see the entry
    key     [P], the pair's key tile, counted from the sequence's entry 0
    one_to_one  whether pair p belongs to tile p
    """

    tile: Tensor
    cell: Tensor
    heads: Tensor
    entries: Tensor
    column: Tensor
    hidden: Tensor
    key: Tensor
    width: int
    one_to_one: bool


@dataclass(slots=True)
class Slab:
    """Query tiles that are computed together.

    rows [C, Q]: the batch row in each slot.  valid: flat slots that hold a row.  out_rows: those rows.
    positions [C, Q]: logical positions, -1 in slots without a row.
    sequence, first, stop: per tile, its sequence and its key tiles [first, stop).  tree [C, Q]: row within its tree, -1 if none.
    unit [C]: the unit of the tile's rows.
    """

    rows: Tensor
    valid: Tensor
    out_rows: Tensor
    positions: Tensor
    sequence: Ints
    first: Ints
    stop: Ints
    tree: Ints | None
    unit: Ints
    kept: list[Round] = field(default_factory=list)


class Tiles(Protocol):
    """What attention needs of a plan.  entries: of the longest table, in whole blocks.  kv_heads: that a query tile spans."""

    group: int
    kv_heads: int
    sequences: int
    entries: int

    @property
    def slabs(self) -> Sequence[Slab]: ...
    def rounds(self, slab: Any) -> Iterator[Round]: ...


class AttentionPlan:
    """The tiles of one batch in one KV group of the pool.  Positions of the batch's entries must already stand there.

    only    bool [S]: the sequences whose rows are computed, all by default
    units   int64 [T]: rows of different units never share a query tile (`block_sparse.py` gives each unit its own entries)
    """

    def __init__(
        self,
        batch: Batch,
        where: GroupBatch,
        pool: KVPool,
        group: int,
        heads: int,
        tiling: Tiling,
        *,
        only: Bools | None = None,
        units: Ints | None = None,
    ) -> None:
        shape = pool.groups[group]
        spec = pool.specs[shape.model]
        self.group = group
        self.tiling = tiling
        self.kv_heads = spec.kv_heads
        self.sequences = len(batch.bounds) - 1
        self.entries = where.tables_SB.shape[1] * shape.block_tokens
        self._pool = pool
        self._tables = where.tables_SB
        self._first = where.first_S.cpu().numpy()
        self._lengths = where.lengths_S.cpu().numpy()
        self._window = shape.window
        bounds = np.asarray(batch.bounds, dtype=np.int64)
        self._counts = np.diff(bounds)
        positions = batch.positions_T.cpu().numpy()
        final = positions[np.maximum(bounds[1:] - 1, 0)] if positions.size else np.zeros_like(self._counts)
        self._whole = self._first + self._lengths == final + 1
        self._ancestors = {
            s: ancestors(parents, int(self._counts[s]) - len(parents)) for s, parents in batch.trees.items() if parents
        }
        self._in_tree = np.array([s in self._ancestors for s in range(self.sequences)], dtype=bool)
        # Scratch: keys and values of a pair, twice; a query row's scores and mixes in a pair; its mixes in all cells of a group.
        self._pair_bytes = 4 * 4 * spec.kv_heads * spec.head_dim * tiling.keys
        self._row_bytes = 4 * heads * (4 * spec.head_dim + 3 * tiling.keys)
        self._cell_bytes = 4 * heads * 2 * spec.head_dim
        self._only = np.ones(self.sequences, dtype=bool) if only is None else only
        self._units = np.zeros(bounds[-1], dtype=np.int64) if units is None else units
        self.slabs: list[Slab] = self._cut(bounds, positions)
        pairs = [(int((slab.stop - slab.first).sum()), slab.rows.shape[1]) for slab in self.slabs]
        cached = sum(count * tiling.keys * (size + 8 * (spec.kv_heads + 2)) for count, size in pairs)
        self._keep = cached <= CACHED_BYTES

    def rounds(self, slab: Slab) -> Iterator[Round]:
        """The slab's pairs, group of key tiles after group, in ascending order for each query tile."""
        if slab.kept:
            yield from slab.kept
            return
        base = slab.first // self.tiling.group
        last = (slab.stop - 1) // self.tiling.group
        for index in range(int((last - base).max()) + 1):
            part = self._round(slab, base + index)
            if self._keep:
                slab.kept.append(part)
            yield part

    # ------------------------------------------------------------------------------------------ query tiles

    def _rows(self, bounds: Ints) -> tuple[Ints, Ints, Ints]:
        """For each row of the batch its sequence, its index in it, and its entry, counted from the sequence's entry 0."""
        sequence = np.repeat(np.arange(self.sequences), self._counts)
        within = np.arange(bounds[-1]) - bounds[sequence]
        return sequence, within, (self._first + self._lengths - self._counts)[sequence] + within

    def _small(self) -> Bools:
        """The sequences whose rows fit one small query tile."""
        total, size = self._first + self._lengths, self.tiling.decode
        found: Bools = (self._counts > 0) & ((total - self._counts) // size == (total - 1) // size)
        return found

    def _cut(self, bounds: Ints, positions: Ints) -> list[Slab]:
        sequence, within, entry = self._rows(bounds)
        fits = self._small()
        slabs: list[Slab] = []
        for size, chosen in ((self.tiling.decode, fits), (self.tiling.prefill, ~fits)):
            rows = np.flatnonzero((chosen & self._only)[sequence])
            if rows.size:
                slabs.extend(self._slabs(size, rows, sequence[rows], entry[rows], positions[rows], within[rows]))
        return slabs

    def _slabs(
        self, size: int, rows: Ints, sequence: Ints, entry: Ints, positions: Ints, within: Ints
    ) -> Iterator[Slab]:
        """Query tiles of one size over the given rows, in slabs whose pairs fit the scratch."""
        unit = self._units[rows]
        turn = np.flatnonzero((np.diff(sequence) != 0) | (np.diff(entry // size) != 0) | (np.diff(unit) != 0)) + 1
        heads = np.concatenate(([0], turn))
        tile = np.zeros(rows.size, dtype=np.int64)
        tile[turn] = 1
        tile = np.cumsum(tile)
        owner = sequence[heads]
        first, stop = self._key_tiles(
            owner, np.minimum.reduceat(positions, heads), np.maximum.reduceat(positions, heads)
        )
        step = self._tiles_of_slab(size, owner, first, stop)
        for at in range(0, heads.size, step):
            mine = (tile >= at) & (tile < at + step)
            count = min(step, heads.size - at)
            slot = (tile[mine] - at) * size + entry[mine] % size
            grid = np.full(count * size, rows[mine][0])
            grid[slot] = rows[mine]
            where = np.full(count * size, -1)
            where[slot] = positions[mine]
            tree: Ints | None = None
            if self._in_tree[owner[at : at + step]].any():
                flat = np.full(count * size, -1)
                flat[slot] = self._tree_rows(sequence[mine], within[mine])
                tree = flat.reshape(count, size)
            yield Slab(
                rows=self._tensor(grid).view(count, size),
                valid=self._tensor(slot),
                out_rows=self._tensor(rows[mine]),
                positions=self._tensor(where).view(count, size),
                sequence=owner[at : at + step],
                first=first[at : at + step],
                stop=stop[at : at + step],
                tree=tree,
                unit=unit[heads[at : at + step]],
            )

    def _tiles_of_slab(self, size: int, owner: Ints, first: Ints, stop: Ints) -> int:
        """How many query tiles, with as many key tiles as the widest of them has, fit the scratch."""
        widest = min(int((stop - first).max()), self.tiling.group)
        tile_bytes = widest * (self._pair_bytes + size * self._row_bytes)
        tile_bytes += self.tiling.group * size * self._cell_bytes if widest > 1 else 0
        return max(1, self.tiling.scratch_bytes // tile_bytes)

    def _key_tiles(self, owner: Ints, lowest: Ints, highest: Ints) -> tuple[Ints, Ints]:
        """Key tiles [first, stop) that the rows of each query tile may see, given their lowest and highest positions.

        Entries ascend in position and never outnumber it, so a row at position p sees none beyond entry p, except in a tree.
        Only a table that holds every position says where a window begins.
        """
        dropped, total = self._first[owner], (self._first + self._lengths)[owner]
        tree = self._in_tree[owner]
        last = np.where(tree, total, np.minimum(total, highest + 1))
        begin = dropped
        if self._window is not None:
            whole = self._whole[owner]
            begin = np.where(whole & ~tree, np.maximum(dropped, lowest - self._window + 1), dropped)
        return begin // self.tiling.keys, np.maximum(-(-last // self.tiling.keys), begin // self.tiling.keys + 1)

    def _tree_rows(self, sequence: Ints, within: Ints) -> Ints:
        """Index of each row within its sequence's tree, or -1."""
        found = np.full(sequence.size, -1)
        for s, seen in self._ancestors.items():
            mine = sequence == s
            found[mine] = np.maximum(within[mine] - (self._counts[s] - seen.shape[0]), -1)
        return found

    # ------------------------------------------------------------------------------------------ pairs

    def _round(self, slab: Slab, group: Ints) -> Round:
        """The pairs of each query tile with its key tiles of the given group, [C]."""
        tile, key = self._listed(slab, group)
        width = 1 << int((key % self.tiling.group).max()).bit_length()
        one_to_one = tile.size == group.size and bool((tile == np.arange(tile.size)).all())
        return self._pairs_of(slab, tile, key, width, one_to_one=one_to_one)

    def _listed(self, slab: Slab, group: Ints) -> tuple[Ints, Ints]:
        """(query tile, key tile) of these pairs."""
        size = self.tiling.group
        begin = np.maximum(slab.first, group * size)
        count = np.maximum(np.minimum(slab.stop, (group + 1) * size) - begin, 0)
        tile = np.repeat(np.arange(count.size), count)
        return tile, np.arange(tile.size) - np.repeat(np.cumsum(count) - count, count) + begin[tile]

    def _pairs_of(self, slab: Slab, tile: Ints, key: Ints, width: int, *, one_to_one: bool = False) -> Round:
        """The given pairs of query tiles of the slab with key tiles."""
        mine = self._tensor(tile)
        found = self._seen(slab.sequence[tile], key, slab.positions.index_select(0, mine))
        if slab.tree is not None:
            self._hide_strangers(found.hidden, slab.tree[tile], slab.sequence[tile], found.key)
        found.tile, found.cell = mine, self._tensor(tile * width + key % self.tiling.group)
        found.width, found.one_to_one = width, one_to_one
        return found

    def _seen(self, owner: Ints, key: Ints, query: Tensor) -> Round:
        """Pairs of queries at positions [P, Q] with key tiles of their sequences, each a query tile of its own."""
        pool, keys, own_block = self._pool, self.tiling.keys, self._pool.groups[self.group].block_tokens
        tables = self._tables.index_select(0, self._tensor(owner))
        lengths = self._tensor(self._lengths[owner])[:, None]
        entry = self._tensor(key * keys - self._first[owner])[:, None] + torch.arange(keys, device=tables.device)
        foreign = (entry < 0) | (entry >= lengths)
        inner = torch.minimum(entry.clamp_min(0), lengths - 1)
        block = tables.gather(1, torch.div(inner, own_block, rounding_mode="floor"))
        offset = inner % own_block
        row = pool.row_of(self.group, block, offset) * self.kv_heads
        heads = row[:, None, :] + torch.arange(self.kv_heads, device=row.device)[:, None]
        position = pool.positions(self.group)[block, offset].to(torch.int64)
        gap = query[:, :, None] - position[:, None, :]
        hidden = (gap < 0) | foreign[:, None, :]
        if self._window is not None:
            hidden |= gap >= self._window
        each = torch.arange(owner.size, device=row.device)
        return Round(
            tile=each,
            cell=each,
            heads=heads,
            entries=block * own_block + offset,
            column=(self._tensor(owner)[:, None] * self.entries + inner).masked_fill(foreign, -1),
            hidden=hidden,
            key=self._tensor(key),
            width=1,
            one_to_one=True,
        )

    def _hide_strangers(self, hidden: Tensor, tree: Ints, owner: Ints, key: Tensor) -> None:
        """Rows of a tree see, of the tree's entries, only ancestors and themselves; tree [P, Q], key [P]: key tiles."""
        for s, seen in self._ancestors.items():
            pairs = np.flatnonzero(owner == s)
            if not pairs.size:
                continue
            index = self._tensor(pairs)
            row = self._tensor(tree[pairs])
            first = int(self._first[s] + self._lengths[s]) - seen.shape[0]
            start = key.index_select(0, index)[:, None] * self.tiling.keys - first
            node = start + torch.arange(self.tiling.keys, device=start.device)
            table = seen.to(hidden.device)
            known = table[row.clamp_min(0)[:, :, None], node.clamp(0, seen.shape[0] - 1)[:, None, :]]
            bad = (row[:, :, None] >= 0) & (node[:, None, :] >= 0) & ~known
            hidden[index] = hidden[index] | bad

    def _tensor(self, values: Ints | Bools) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._tables.device)


def ancestors(parents: tuple[int, ...], first: int) -> Tensor:
    """seen[i, j], bool: whether guess j is guess i or one of its ancestors.

    parents: for each guess, the row that it follows, counted in the sequence, whose guesses begin at row `first`.
    """
    seen = torch.eye(len(parents), dtype=torch.bool)
    for index, parent in enumerate(parents):
        assert parent - first < index, "a guess follows a row that comes before it"
        if parent >= first:
            seen[index] |= seen[parent - first]
    return seen
