"""TokenRing: queries pass around a ring of ranks in one direction, results in the other at the same time.

Paper    Wang et al., TokenRing, arXiv:2412.20501                                                  (000-63)
Rule     as context parallelism, but queries pass on and the results of the block before go straight back meanwhile, over the
         other direction of the link: N - 1 passes of queries, and one of results that nothing hides
Units    ranks: devices in a ring
Cost     each rank reads all weights
Pays     with as many heads of keys as of queries: a block of queries is half of one of K and V.  With g queries for each key K
         and V are 2/g of queries, and passing them on is cheaper from g > 2 on
Differs  nothing is chosen: queries always pass on.  Causal work is taken as even
Raises   ValueError for a share outside (0, 1] or ranks < 1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from weft.cost._common import Rates, by_rows, ways
from weft.registry import register
from weft.slots.cost import Figures, Hardware, Load, Parts
from weft.traits import Traits


@register("cost", "tokenring")
@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRing:
    """Both directions of a link."""

    ranks: int = 2
    compute: float = 0.65
    memory: float = 0.8
    attention: float = 0.4
    dtype: str = "bfloat16"
    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()

    def __post_init__(self) -> None:
        shares = (self.compute, self.memory, self.attention)
        if self.ranks < 1 or not all(0 < x <= 1 for x in shares):
            raise ValueError("ranks is at least 1, and the shares are above 0 and at most 1")

    def on(self, hardware: Hardware, model: Figures) -> Callable[[Load], Parts]:
        rates = Rates(hardware, model, self.dtype, self.compute, self.memory, self.attention)
        link, host_s, n = hardware.link, hardware.launch_s, self.ranks

        def price(load: Load) -> Parts:
            found = by_rows(rates, load, n)
            told = rates.ring_s(load.whole_rows / n)
            if n > 1 and load.rows:
                told += ways(found, n, link, (found.attention + found.kv) / n)[2]
            return found.split(told, host_s + load.works * 2e-6)

        return price
