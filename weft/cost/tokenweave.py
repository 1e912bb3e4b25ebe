"""TokenWeave: a batch in two parts whose waves are no more than those of the whole, one computing while the other's sums go out.

Paper    Gond et al., TokenWeave, arXiv:2505.11329                                                 (000-50)
Rule     products run in waves of `units` tiles of `tile` rows and `columns` columns; from `least` rows on two parts take turns
         as in ISO, cut where a wave ends, so that both have the waves of the whole (one wave becomes two), with 1 - `taken` /
         `units` of the arithmetic; a step that would take longer so, and one with fewer rows, is not split
Units    units: multiprocessors of a device, taken: of them for sums; tile, columns: of a block of a product; least: rows
Cost     none: sums are the same
Pays     with several --devices from a thousand rows on
Differs  waves are those of the product with the model's width; norms, which the paper computes within sums, are not priced;
         sums go around a ring as they do everywhere here, which takes longer than the paper's, so that more can be hidden
Raises   ValueError for a share outside (0, 1], or taken not below units, or anything else below 1
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from weft.cost._common import Rates, by_rows, two_streams
from weft.registry import register
from weft.slots import Claim
from weft.slots.cost import Figures, Hardware, Load, Parts
from weft.traits import Traits


@register("cost", "tokenweave")
@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWeave:
    """Splits that cost no wave."""

    units: int = 132
    taken: int = 4
    tile: int = 128
    columns: int = 256
    least: int = 1024
    compute: float = 0.65
    memory: float = 0.8
    attention: float = 0.4
    dtype: str = "bfloat16"
    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()
    claim: ClassVar[Claim] = Claim(
        "up to 1.26 times the throughput under tensor parallelism over NVLink", "output_tok_s", 1.26, "more", case="sums",
    )  # fmt: skip

    def __post_init__(self) -> None:
        shares = (self.compute, self.memory, self.attention)
        sizes = (self.units, self.tile, self.columns, self.least)
        if min(sizes) < 1 or not 0 <= self.taken < self.units or not all(0 < x <= 1 for x in shares):
            raise ValueError("sizes are at least 1, taken is below units, and the shares are above 0 and at most 1")

    def on(self, hardware: Hardware, model: Figures) -> Callable[[Load], Parts]:
        rates = Rates(hardware, model, self.dtype, self.compute, self.memory, self.attention)
        host_s = hardware.launch_s
        across = -(-model.width // self.columns)

        def waves(rows: float) -> int:
            return math.ceil(math.ceil(rows / self.tile) * across / self.units)

        def price(load: Load) -> Parts:
            found = by_rows(rates, load, 1)
            told = rates.ring_s(load.whole_rows)
            if told and load.rows >= self.least:
                whole = waves(load.rows)
                # The first part ends where a wave does, so that both together have as many waves as the whole.
                computed = (found.weights + found.attention + found.kv) * max(whole, 2) / whole
                computed /= 1 - self.taken / self.units
                halves = 2 * rates.ring_s(load.whole_rows / 2)  # each has the latency of a whole one
                alone = found.weights + found.attention + found.kv
                told = min(told, two_streams(computed, halves, 2 * model.layers) - alone)
            return found.split(told, host_s + load.works * 2e-6)

        return price
