"""Context parallelism: the positions of a step on several ranks, and K and V, or queries, pass around a ring of them.

Paper    Yang et al., Context Parallelism for Scalable Million-Token Inference, arXiv:2411.01783    (002-54)
Rule     each rank has 1/N of the rows, pairs and entries; N - 1 times a block of K and V passes on, or of queries, whose
         results go back to their owners at the end; whichever shows less beside the attention of a block
Units    ranks: hosts, each of which has --devices
Cost     each rank reads all weights
Pays     for long prompts; a decode reads 1/N of its entries, and sends its query
Differs  causal work is taken as even (the paper's order of 2 N chunks makes it so); links are --hardware's; KV blocks are those
         of one host, so those of N are given by --kv-blocks
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


@register("cost", "contextparallel")
@dataclass(frozen=True, slots=True, kw_only=True)
class ContextParallel:
    """A ring of hosts."""

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
                told += min(ways(found, n, link, (found.attention + found.kv) / n)[:2])
            return found.split(told, host_s + load.works * 2e-6)

        return price
