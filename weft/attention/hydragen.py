"""Hydragen: what several sequences have in common is read once for all of them.

Paper    Juravsky et al., Hydragen: High-Throughput LLM Inference with Shared Prefixes, arXiv:2402.05099 [003-31]
Rule     out = sum_i exp(lse_i - lse) * out_i over the shared parts, for which the queries of all sequences are stacked to one
         matrix, and each one's own rest; the parts are a tree: sequences stand together as far as their tables agree
Shapes   tables [S, blocks]; who shares is a number for each (sequence, key tile)
Units    entries_shared: entries of a layer's KV that were not read once more
Cost     comparing the tables, O(S * blocks) for each step; no state.  Reads fall from (sequences * shared) to shared entries
Pays     where many sequences that decode together have a long beginning in common: 2.0 to 3.6 times the speed with 16 or 32 of
         them over 1,024 or 2,048 shared tokens.  Where nothing is shared, nothing is lost
Differs  the unit is a key tile (64 or 128 entries), not a segment of any length: every level of the tree is cut into tiles, and
         parts are merged by the tree of sums that plain attention has, which makes the results equal to the bit.  Prompts, whose
         rows fill tiles of their own, are left as they are
Raises   nothing
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from weft.registry import register
from weft.traits import Traits

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MULTIPLIER = 0x5851F42D4C957F2D
"""Odd; its powers weigh the places of block ids in a sum that tells key tiles apart."""


@register("attention", "hydragen")
@dataclass(frozen=True, slots=True, kw_only=True)
class Hydragen:
    """Pays where many sequences have a long beginning in common: system prompts, few-shot examples, best of n, searches."""

    acts: dict[str, int] = field(default_factory=lambda: {"entries_shared": 0}, init=False, compare=False)
    tile: ClassVar[int] = 1
    per_request: ClassVar[bool] = True
    traits: ClassVar[Traits] = Traits()

    def plan(self, call: Any) -> tuple[bool, Any]:
        """(whether anything is shared, the plan)."""
        import numpy as np

        counts = np.diff(np.asarray(call.batch.bounds, dtype=np.int64))
        decoding = call.sequences[counts[call.sequences] <= call.few_rows]
        if decoding.size < 2:
            return False, call.tiles()
        first = call.where.first_S.cpu().numpy()
        stood = first + call.where.lengths_S.cpu().numpy() - counts
        block = call.pool.groups[call.group].block_tokens
        tables = call.where.tables_SB.cpu().numpy()[decoding]
        numbers = same_tiles(tables, first[decoding], stood[decoding], block, call.key_tile)
        if (numbers < 0).all():
            return False, call.tiles()
        shared = np.full((counts.size, numbers.shape[1]), -1)
        shared[decoding] = numbers
        return True, call.sharing(shared)

    def run(self, call: Any, plan: tuple[bool, Any]) -> None:
        shares, tiles = plan
        if not shares:
            call.dense(tiles)
            return
        call.shared(tiles)
        self.acts["entries_shared"] += tiles.saved


def same_tiles(
    tables_SB: npt.NDArray[np.int64],
    first_S: npt.NDArray[np.int64],
    stood_S: npt.NDArray[np.int64],
    block: int,
    keys: int,
) -> npt.NDArray[np.int64]:
    """The first sequence that reads the same blocks in a key tile, -1 where nobody else does; int64 [S, K].

    tables_SB: block ids of `block` entries.  first_S: entries dropped before a table, whole blocks.  stood_S: entries that stand,
    counted like key tiles from the sequence's entry 0.  A key tile of `keys` entries counts where it stands whole.
    """
    import numpy as np

    count = tables_SB.shape[0]
    tiles = int(stood_S.max()) // keys
    if tiles <= 0:
        return np.full((count, 0), -1)
    # Block ids by their place from entry 0 on; what a table does not have is -1.
    places = np.arange(-(-tiles * keys // block)) - (first_S // block)[:, None]
    inside = (places >= 0) & (places < tables_SB.shape[1])
    blocks = np.where(inside, np.take_along_axis(tables_SB, np.where(inside, places, 0), 1), -1)
    tile = np.arange(tiles)
    low, high = tile * keys // block, -(-(tile + 1) * keys // block)
    whole = (low * block >= first_S[:, None]) & ((tile + 1) * keys <= stood_S[:, None])
    # Equal tiles have equal sums of their ids by place; whether tiles with equal sums are equal is looked up afterwards.
    powers = np.cumprod(np.full(blocks.shape[1], MULTIPLIER))
    sums = np.concatenate([np.zeros((count, 1), np.int64), np.cumsum(blocks * powers, 1)], 1)
    sums = np.where(whole, sums[:, high] - sums[:, low], np.arange(count)[:, None])
    order = np.argsort(sums, 0, kind="stable")
    ordered = np.take_along_axis(sums, order, 0)
    leads = np.ones((count, tiles), bool)
    leads[1:] = ordered[1:] != ordered[:-1]
    place = np.maximum.accumulate(np.where(leads, np.arange(count)[:, None], 0), 0)
    found = np.empty((count, tiles), np.int64)
    np.put_along_axis(found, order, np.take_along_axis(order, place, 0), 0)
    good = whole & whole[found, tile]
    for within in range(int((high - low).max())):
        at = np.minimum(low + within, high - 1)
        good &= blocks[:, at] == blocks[found, at]
    members = np.zeros((count, tiles), np.int64)
    np.add.at(members, (found, np.broadcast_to(tile, found.shape)), good)
    return np.where(good & (members[found, tile] > 1), found, -1)
