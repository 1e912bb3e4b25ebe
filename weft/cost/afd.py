"""AFD: attention on some devices, everything else on others, and three parts of a batch between them.

Paper    StepFun, Step-3 is Large yet Affordable, arXiv:2507.19427                  (004-57)
Rule     a step takes the longest of products, of attention, and of the link, where `batches` parts of it take turns, and their
         sum where it has fewer sequences; a row's hidden state goes there and comes back in each layer, in `sent_bits`
Units    flops, bytes_s, kv_bytes: of all devices of attention together, whose memory has the KV pool; link_bytes_s, link_s: of
         the link to them; price_h: of those devices, US dollars an hour; batches: parts; sent_bits: of a value
Cost     as roofline, and the devices for attention, which `tok_per_usd` alone counts
Pays     where a stage of the link is shorter than a third of the step's; what attention takes is then hidden
Differs  nothing is hidden inside of a layer beside what parts that take turns hide
Raises   ValueError for a share outside (0, 1], batches < 1, or a rate that is not above 0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from weft.cost._common import Apart
from weft.registry import register
from weft.slots import Claim
from weft.slots.cost import Figures
from weft.traits import Traits


@register("cost", "afd")
@dataclass(frozen=True, slots=True, kw_only=True)
class AFD(Apart):
    """Two kinds of devices."""

    flops: float = 3 * 989.4e12
    bytes_s: float = 3 * 3350e9
    kv_bytes: float = 3 * 80e9
    price_h: float = 3 * 3.20
    batches: int = 3
    sent_bits: float = 8.0
    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()
    claim: ClassVar[Claim] = Claim(
        "1.74 times the tokens for each device, together with the shape of Step-3", "output_tok_s", 1.74, "more",
        against="roofline", case="contexts", devices=4,
    )  # fmt: skip

    def __post_init__(self) -> None:
        Apart.__post_init__(self)
        if self.sent_bits <= 0:
            raise ValueError(f"sent_bits is above 0, got {self.sent_bits}")

    def sent_bytes(self, model: Figures) -> float:
        return 2 * model.width * model.layers * self.sent_bits / 8
