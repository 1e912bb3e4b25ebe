"""NanoFlow: products, memory traffic and communication of a step overlap, in nano-batches.

Paper    Zhu et al., NanoFlow, arXiv:2408.12757                                                    (003-20)
Rule     a step in `nano` parts takes max(arithmetic, memory, network) / efficiency, where each part reads the weights again; it
         is taken whole, as a roofline would, where that is shorter
Units    nano: parts of a batch; efficiency: share that resources keep of their rate beside each other
Cost     twice that of roofline
Pays     where a step's resources are used in equal shares; where one of them dominates, its time is the step's anyway, and
         weights that are read once more for each part cost more than overlapping gains
Differs  shares of execution units are not searched; operators overlap as if any could run beside any other
Raises   ValueError for a share outside (0, 1] or nano < 2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from weft.cost._common import Rates
from weft.registry import register
from weft.slots import Claim
from weft.slots.cost import Figures, Hardware, Load, Parts
from weft.traits import Traits


@register("cost", "nanoflow")
@dataclass(frozen=True, slots=True, kw_only=True)
class NanoFlow:
    """Parts tell what the time would go to without overlap, scaled to the time that it takes."""

    nano: int = 2
    efficiency: float = 0.85
    compute: float = 0.65
    memory: float = 0.8
    attention: float = 0.4
    dtype: str = "bfloat16"
    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()
    claim: ClassVar[Claim] = Claim(
        "1.91 times the throughput of engines whose operators follow each other", "output_tok_s", 1.91, "more",
        against="roofline", case="jam",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.nano < 2 or not all(0 < x <= 1 for x in (self.efficiency, self.compute, self.memory, self.attention)):
            raise ValueError("nano is at least 2, and the shares are above 0 and at most 1")

    def on(self, hardware: Hardware, model: Figures) -> Callable[[Load], Parts]:
        rates = Rates(hardware, model, self.dtype, self.compute, self.memory, self.attention)
        host_s, host_link = hardware.launch_s, hardware.host_link.bytes_s

        def price(load: Load) -> Parts:
            found = rates.operators(load)
            weights = sum(max(o.compute_s, o.memory_s) for o in found if not o.attention)
            attention = sum(o.compute_s for o in found if o.attention and o.compute_s > o.memory_s)
            kv = sum(o.memory_s for o in found if o.attention and o.compute_s <= o.memory_s)
            ring = rates.ring_s(load.whole_rows)
            whole = weights + attention + kv + ring
            again = (self.nano - 1) * sum(o.memory_s for o in found if not o.attention)
            arithmetic, traffic = sum(o.compute_s for o in found), sum(o.memory_s for o in found) + again
            overlapped = max(arithmetic, traffic, ring) / self.efficiency
            scale = overlapped / whole if load.works > 1 and overlapped < whole else 1.0
            stored = load.stored * model.block_bytes / host_link
            return Parts(
                weights * scale, attention * scale, kv * scale + stored, ring * scale, host_s + load.works * 2e-6
            )

        return price
