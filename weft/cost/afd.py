"""AFD: attention on some devices, everything else on others, and three parts of a batch between them.

Paper    StepFun, Step-3 is Large yet Affordable, arXiv:2507.19427                  (004-57)
Rule     a step takes the longest of products, of attention, and of the link, where `batches` parts of it take turns, and their
         sum where it has fewer sequences; a row's hidden state goes there and comes back in each layer, in `sent_bits`
Units    flops, bytes_s, kv_bytes: of all devices of attention together, whose memory has the KV pool; link_bytes_s, link_s: of
         the link to them; batches: parts; sent_bits: of a value
Cost     as roofline, and the devices for attention, which no result counts
Pays     where a stage of the link is shorter than a third of the step's; what attention takes is then hidden
Differs  nothing is hidden inside of a layer beside what parts that take turns hide
Raises   ValueError for a share outside (0, 1], batches < 1, or a rate that is not above 0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from weft.cost._common import Rates
from weft.registry import register
from weft.slots import Claim
from weft.slots.cost import Figures, Hardware, Load, Parts
from weft.traits import Traits


@register("cost", "afd")
@dataclass(frozen=True, slots=True, kw_only=True)
class AFD:
    """Two kinds of devices."""

    flops: float = 3 * 989.4e12
    bytes_s: float = 3 * 3350e9
    kv_bytes: float = 3 * 80e9
    link_bytes_s: float = 50e9
    link_s: float = 5e-6
    batches: int = 3
    sent_bits: float = 8.0
    compute: float = 0.65
    memory: float = 0.8
    attention: float = 0.4
    dtype: str = "bfloat16"
    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()
    claim: ClassVar[Claim] = Claim(
        "1.74 times the tokens for each device, together with the shape of Step-3", "output_tok_s", 1.74, "more",
        against="roofline", case="contexts", devices=4,
    )  # fmt: skip

    def __post_init__(self) -> None:
        shares, sizes = (
            (self.compute, self.memory, self.attention),
            (self.flops, self.bytes_s, self.kv_bytes, self.link_bytes_s, self.batches, self.sent_bits),
        )
        if min(sizes) <= 0 or self.batches < 1 or self.link_s < 0 or not all(0 < x <= 1 for x in shares):
            raise ValueError("rates and batches are above 0, and the shares are above 0 and at most 1")

    def on(self, hardware: Hardware, model: Figures) -> Callable[[Load], Parts]:
        rates = Rates(hardware, model, self.dtype, self.compute, self.memory, self.attention)
        host_s = hardware.launch_s
        others = Rates(
            replace(hardware, flops={self.dtype: self.flops}, memory_bytes_s=self.bytes_s, devices=1), model, self.dtype,
            self.compute, self.memory, self.attention,
        )  # fmt: skip
        values = 2 * model.width * model.layers
        sent_bytes = values * self.sent_bits / 8

        def price(load: Load) -> Parts:
            weights = sum(max(o.compute_s, o.memory_s) for o in rates.operators(load) if not o.attention)
            weights += rates.ring_s(load.whole_rows)
            attending = [o for o in others.operators(load) if o.attention]
            attention = sum(o.compute_s for o in attending if o.compute_s > o.memory_s)
            kv = sum(o.memory_s for o in attending if o.compute_s <= o.memory_s)
            told = load.whole_rows * sent_bytes / self.link_bytes_s + (
                2 * model.layers * self.link_s if load.rows else 0.0
            )
            whole = weights + attention + kv + told
            if load.works >= self.batches > 1 and whole:
                # Weights are read once for each part.
                read = sum(
                    max(o.compute_s, self.batches * o.memory_s) for o in rates.operators(load) if not o.attention
                )
                scale = min(1.0, max(read, attention + kv, told) / whole)
                return Parts(weights * scale, attention * scale, kv * scale, told * scale, host_s + load.works * 2e-6)
            return Parts(weights, attention, kv, told, host_s + load.works * 2e-6)

        return price
