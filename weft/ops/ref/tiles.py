"""Which shapes give a row the same bits whatever stands beside it.

A BLAS picks its kernel by the shape of the whole product, and another kernel may add in another order; so a row's result may
change with the number of rows.  Within one shape it does not depend on the row's slot.  In the invariant mode only shapes are
used that agree with each other bit for bit, found by trial when the model is built, with the thread count of that moment;
rows are padded up to them.

Legend.  K: input width.  N: output width.  G: query heads that share a kv head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from weft.models.spec import PAD_ROWS
from weft.ops.ref.basic import Slabs, linear

CANDIDATES = (8, 16, 32, 64, 128, 256, 512)
"""Row counts that are tried.  Each divides the next, so padding to the smallest never exceeds PAD_ROWS."""
SMALL_ROWS = 16
"""A single row should not cost more than a product of this many."""
TRIAL_FLOP = 3e10
"""Work that the trials of one weight may cost; larger weights try fewer row counts."""


def whole(rows: int) -> Slabs:
    """One product for all rows: fastest, and bits depend on the batch."""
    return [(0, rows)] if rows else []


def slabs_for(ladder: Sequence[int]) -> Callable[[int], Slabs]:
    """A function that cuts a number of rows into products of the ladder's row counts, largest first."""

    @lru_cache(maxsize=256)
    def cut(rows: int) -> Slabs:
        slabs, start = [], 0
        while start < rows:
            left = rows - start
            take = next((size for size in reversed(ladder) if size <= left), ladder[0])
            slabs.append((start, take))
            start += take
        return slabs

    return cut


def _trial(weight: Tensor, x: Tensor, rows: int, shift: int) -> Tensor:
    """x @ weight.T in products of `rows` rows, with the rows rolled by `shift` slots and rolled back."""
    rolled = x.roll(shift, 0)
    out = rolled.new_empty(x.shape[0], weight.shape[0])
    linear(rolled, weight, None, out, [(start, rows) for start in range(0, x.shape[0], rows)])
    return out.roll(-shift, 0)


def agreeing_rows(weights: Iterable[Tensor], most: int = CANDIDATES[-1]) -> tuple[int, ...]:
    """Row counts, ascending and at most `most`, for which products with all these weights give every row the same bits in
    every slot.

    weights: [N, K], one for each distinct shape.  Of the sets that agree, one with a small member (a single row is padded to
    it) is preferred, and then the one that reaches the largest row count; a single row count if none agree.
    """
    allowed = {size: set(CANDIDATES) for size in CANDIDATES if size <= PAD_ROWS}
    for weight in weights:
        classes = _classes(weight, most)
        for small, members in allowed.items():
            members.intersection_update(next((found for found in classes if small in found), {small}))
    sets = [members for members in allowed.values() if members]
    best = max(sets, key=lambda members: (min(members) <= SMALL_ROWS, max(members)), default={SMALL_ROWS})
    return tuple(sorted(best))


def _classes(weight: Tensor, most: int) -> list[set[int]]:
    """Row counts in sets that give equal bits.  Keeps one result for each set, so that trying costs little memory."""
    outs, width = weight.shape
    sizes = [CANDIDATES[0]]
    for count, size in enumerate(CANDIDATES[1:], 2):
        if size <= most and (size <= SMALL_ROWS or 4.0 * count * size * outs * width <= TRIAL_FLOP):
            sizes.append(size)
    generator = torch.Generator().manual_seed(20240229)
    x = torch.randn(sizes[-1], width, generator=generator).to(weight)
    found: list[tuple[Tensor, set[int]]] = []
    for size in sizes:
        out = _trial(weight, x, size, 0)
        if not torch.equal(out, _trial(weight, x, size, 5)):
            continue  # a row's bits depend on its slot
        for reference, members in found:
            if torch.equal(out, reference):
                members.add(size)
                break
        else:
            found.append((out, {size}))
    return [members for _, members in found]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How attention is cut.

    decode, prefill     query positions in a small and in a large tile; a row of entry e stands in slot e % size
    keys                entries in a key tile, which begins at a multiple of it
    group               key tiles that are merged as one, a power of two
    scratch_bytes       bound of the temporaries
    stacked             sizes of query tiles whose products agree with those of the two
    """

    decode: int
    prefill: int
    keys: int
    group: int = 16
    scratch_bytes: int = 24 << 20
    stacked: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes of query tiles, ascending."""
        return tuple(sorted({self.decode, *self.stacked, self.prefill}))


FAST = Tiling(decode=1, prefill=64, keys=128, stacked=(2, 4, 8, 16, 32))
"""For the mode whose bits may depend on the batch."""


def _attention_trial(query: Tensor, keys: Tensor, rows: int, tiles: int) -> tuple[Tensor, Tensor]:
    """Scores, and scores times keys, of query [n, D] in tiles of `rows` rows, `tiles` of them in one batched product."""
    scores, mixed = [], []
    for at in range(0, query.shape[0], rows * tiles):
        q = query[at : at + rows * tiles].view(-1, rows, query.shape[1])
        k = keys.expand(q.shape[0], -1, -1).contiguous()
        s = torch.bmm(q, k.transpose(1, 2))
        scores.append(s.flatten(0, 1))
        mixed.append(torch.bmm(s, k).flatten(0, 1))
    return torch.cat(scores), torch.cat(mixed)


def invariant_tiling(group_heads: int, head_dim: int, device: torch.device) -> Tiling:
    """The tiling whose small tile is the smallest that agrees with the large one, in every slot and batch count."""
    large, keys = 16, 64
    generator = torch.Generator().manual_seed(20240229)
    query = torch.randn(12 * large * group_heads, head_dim, generator=generator).to(device)
    entries = torch.randn(keys, head_dim, generator=generator).to(device)
    reference = _attention_trial(query, entries, large * group_heads, 12)
    agreeing = []
    for size in (1, 2, 4, 8, 32, 64):
        rows, counts = size * group_heads, [tiles for tiles in (1, 3, 12) if tiles * size <= 12 * large]
        trials = [_attention_trial(query, entries, rows, tiles) for tiles in counts]
        shift = rows // 2 + 1
        rolled = _attention_trial(query.roll(shift, 0), entries, rows, counts[-1])
        trials.append((rolled[0].roll(-shift, 0), rolled[1].roll(-shift, 0)))
        if all(torch.equal(a, b) for trial in trials for a, b in zip(trial, reference, strict=True)):
            agreeing.append(size)
    small = min([*agreeing, large])
    return Tiling(decode=small, prefill=large, keys=keys, stacked=tuple(agreeing))
