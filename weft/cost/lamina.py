"""Lamina: products on one kind of device, attention on another that has memory in place of arithmetic.

Paper    Chen et al., Attention Offloading, arXiv:2405.01814                        (003-28)
Rule     a step takes the longest of products, of attention on the others, and of the link between them, where `batches` of the
         sequences take turns, and their sum where it cannot be split; a row sends its query, keys and values, and gets a
         result, in each layer
Units    flops, bytes_s, kv_bytes: of all devices of attention together, whose memory has the KV pool; link_bytes_s, link_s: of
         the link to them; batches: parts
Cost     as roofline, and the devices for attention, which no result counts
Pays     with long contexts: cheap memory takes the entries, and the batch on dear arithmetic grows
Differs  nothing is hidden inside of a layer beside what parts that take turns hide; no price is known, so none is claimed
Raises   ValueError for a share outside (0, 1], batches < 1, or a rate that is not above 0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from weft.cost._common import Rates
from weft.registry import register
from weft.slots.cost import Figures, Hardware, Load, Parts
from weft.traits import Traits


@register("cost", "lamina")
@dataclass(frozen=True, slots=True, kw_only=True)
class Lamina:
    """Two kinds of devices."""

    flops: float = 4 * 312e12
    bytes_s: float = 4 * 2039e9
    kv_bytes: float = 4 * 80e9
    link_bytes_s: float = 50e9
    link_s: float = 5e-6
    batches: int = 2
    compute: float = 0.65
    memory: float = 0.8
    attention: float = 0.4
    dtype: str = "bfloat16"
    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()

    def __post_init__(self) -> None:
        shares, sizes = (
            (self.compute, self.memory, self.attention),
            (self.flops, self.bytes_s, self.kv_bytes, self.link_bytes_s, self.batches),
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
        sent_bytes = sum(2 * k.pair_flops / 4 * model.value_bytes + k.entry_bytes for k in model.kinds)

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
