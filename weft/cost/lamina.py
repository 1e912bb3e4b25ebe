"""Lamina: products on one kind of device, attention on another that has memory in place of arithmetic.

Paper    Chen et al., Attention Offloading, arXiv:2405.01814                        (003-28)
Rule     a step takes the longest of products, of attention on the others, and of the link between them, where `batches` of the
         sequences take turns, and their sum where it cannot be split; a row sends its query, keys and values, and gets a
         result, in each layer: (2 + 2 / g) d numbers of a hidden state of d, where g heads of queries share one of keys
Units    flops, bytes_s, kv_bytes: of all devices of attention together, whose memory has the KV pool; link_bytes_s, link_s: of
         the link to them; price_h: of those devices, US dollars an hour; batches: parts
Cost     as roofline, and the devices for attention, which `tok_per_usd` alone counts
Pays     with long contexts: cheap memory takes the entries, and the batch on dear arithmetic grows; by rent only where the others
         together cost less than what the batch gains (docs/simulator.md has a sum)
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


@register("cost", "lamina")
@dataclass(frozen=True, slots=True, kw_only=True)
class Lamina(Apart):
    """Two kinds of devices."""

    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()
    claim: ClassVar[Claim] = Claim(
        "1.48 to 12.1 times the throughput for its price", "tok_per_usd", 1.48, "more", against="roofline", case="contexts",
    )  # fmt: skip

    def sent_bytes(self, model: Figures) -> float:
        return sum(2 * k.pair_flops / 4 * model.value_bytes + k.entry_bytes for k in model.kinds)
