"""ISO: a prompt in two parts, of which one computes while the sums of the other go over the link.

Paper    Xiao and Su, ISO, arXiv:2409.11155                                                        (002-28)
Rule     a step's 2 L phases (attention and MLP of each layer, a ring sum after each) take c/2 + (4 L - 1) max(c/2, r) + r with
         c of one phase and r of one sum of half its rows, where prompts have at least `least` rows; else the phases and the
         sums of all rows, one after the other
Units    least: rows; bits: of a value as it is sent
Cost     none: sums are the same
Pays     for prompts on several --devices with slow links; decodes are not split
Differs  phases are alike, and both parts take half the time; products of half the rows are as fast for each row
Raises   ValueError for a share outside (0, 1], least < 1 or bits not from 1 to 32
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from weft.cost._common import Rates, by_rows, two_streams
from weft.registry import register
from weft.slots import Claim
from weft.slots.cost import Figures, Hardware, Load, Parts
from weft.traits import Traits


@register("cost", "iso")
@dataclass(frozen=True, slots=True, kw_only=True)
class ISO:
    """Two parts of one sequence."""

    least: int = 256
    bits: float = 16.0
    compute: float = 0.65
    memory: float = 0.8
    attention: float = 0.4
    dtype: str = "bfloat16"
    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()
    claim: ClassVar[Claim] = Claim(
        "prompts take 35 % less time on RTX 4090 under tensor parallelism", "ttft_s.mean", 0.65, "less", case="slow_links",
    )  # fmt: skip

    def __post_init__(self) -> None:
        shares = (self.compute, self.memory, self.attention)
        if self.least < 1 or not 1 <= self.bits <= 32 or not all(0 < x <= 1 for x in shares):
            raise ValueError("least is at least 1, bits from 1 to 32, and the shares are above 0 and at most 1")

    def on(self, hardware: Hardware, model: Figures) -> Callable[[Load], Parts]:
        rates = Rates(hardware, model, self.dtype, self.compute, self.memory, self.attention)
        host_s, scale = hardware.launch_s, self.bits / (8 * model.value_bytes)

        def price(load: Load) -> Parts:
            found = by_rows(rates, load, 1)
            computed, told = found.weights + found.attention + found.kv, rates.ring_s(scale * load.whole_rows)
            if told and load.rows - load.decode_rows >= self.least:
                halves = 2 * rates.ring_s(scale * load.whole_rows / 2)  # each has the latency of a whole one
                told = two_streams(computed, halves, 2 * model.layers) - computed
            return found.split(told, host_s + load.works * 2e-6)

        return price
