"""Ulysses: positions are split among ranks, but in attention heads are, with an exchange of all with all before and after it.

Paper    Jacobs et al., DeepSpeed Ulysses, arXiv:2309.14509                                        (003-69)
Rule     each rank has 1/P of the rows; queries, keys and values of these go out, and results come back: (P - 1) / P of (2 Q +
         KV) / P bytes from each rank, in two exchanges a layer, which nothing hides
Shapes   Q, KV: bytes of the queries, and of the new keys and values, of all rows over all layers
Units    ranks: devices
Cost     each rank reads all weights
Pays     for long prompts over fast links: bytes for each rank stay the same where positions and ranks grow together
Differs  P is taken to divide the heads of keys; no copies of these are made where it does not
Raises   ValueError for a share outside (0, 1] or ranks < 1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from weft.cost._common import Rates, by_rows
from weft.registry import register
from weft.slots.cost import Figures, Hardware, Load, Parts
from weft.traits import Traits


@register("cost", "ulysses")
@dataclass(frozen=True, slots=True, kw_only=True)
class Ulysses:
    """Heads in attention, positions everywhere else."""

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
        entry_bytes = sum(k.entry_bytes for k in model.kinds)

        def price(load: Load) -> Parts:
            found = by_rows(rates, load, n)
            told = rates.ring_s(load.whole_rows / n)
            if n > 1 and load.rows:
                sent = (n - 1) / n * (2 * found.queries + load.whole_rows * entry_bytes) / n
                told += sent / link.bytes_s + 2 * model.layers * link.latency_s
            return found.split(told, host_s + load.works * 2e-6)

        return price
