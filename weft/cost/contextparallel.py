"""Context parallelism: the positions of a step on several ranks, and K and V, or queries, pass around a ring of them.

Paper    Yang et al., Context Parallelism for Scalable Million-Token Inference, arXiv:2411.01783    (002-54)
Rule     each rank has 1/N of the rows, pairs and entries; N - 1 times a block of K and V passes on, or of queries, whose
         results go back to their owners at the end; whichever shows less beside the attention of a block.  With T new rows
         behind P that are there, and g heads of queries for each of keys, queries have fewer bytes than K and V where
         T / (T + P) < 2 / g: at g = 8 from three times as many rows there as new ones on
Units    ranks: hosts, each of which has --devices
Cost     each rank reads all weights
Pays     for long prompts; a decode reads 1/N of its entries, and sends its query
Differs  causal work is taken as even (the paper's order of 2 N chunks makes it so); links are --hardware's; KV blocks are those
         of one host, so those of N are given by --kv-blocks
Raises   ValueError for a share outside (0, 1] or ranks < 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from weft.cost._common import OverRanks, Split, ways
from weft.registry import register
from weft.slots import Claim
from weft.slots.cost import Figures, Link, Load
from weft.traits import Traits


@register("cost", "contextparallel")
@dataclass(frozen=True, slots=True, kw_only=True)
class ContextParallel(OverRanks):
    """A ring of hosts."""

    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()
    claim: ClassVar[Claim] = Claim(
        "long prompts at 93 % of the speed that hosts have together", "ttft_s.mean", 1 / (0.93 * 8), "less", case="long",
    )  # fmt: skip

    def told_s(self, found: Split, load: Load, model: Figures, link: Link) -> float:
        return min(ways(found, self.ranks, link, (found.attention + found.kv) / self.ranks)[:2])
