"""TokenRing: queries pass around a ring of ranks in one direction, results in the other at the same time.

Paper    Wang et al., TokenRing, arXiv:2412.20501                                                  (000-63)
Rule     as context parallelism, but queries pass on and the results of the block before go straight back meanwhile, over the
         other direction of the link: N - 1 passes of queries, and one of results that nothing hides
Units    ranks: devices in a ring
Cost     each rank reads all weights
Pays     with as many heads of keys as of queries: a block of queries is half of one of K and V, so that where nothing is hidden N
         passes take N / (2 N - 2) of the time of a ring of K and V, which is 1 for two ranks and 4/7 for eight.  With g
         queries for each key K and V are 2/g of queries, and passing them on is cheaper from g > 2 on
Differs  nothing is chosen: queries always pass on.  Causal work is taken as even
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


@register("cost", "tokenring")
@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRing(OverRanks):
    """Both directions of a link."""

    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()
    claim: ClassVar[Claim] = Claim(
        "less time than a ring of keys and values (no figure is given)", "ttft_s.mean", 0.99, "less",
        against="contextparallel", case="long",
    )  # fmt: skip

    def told_s(self, found: Split, load: Load, model: Figures, link: Link) -> float:
        return ways(found, self.ranks, link, (found.attention + found.kv) / self.ranks)[2]
