"""EnergonAI: layers in stages on several devices, and batches that follow each other through them without a barrier.

Paper    Du et al., EnergonAI, arXiv:2209.02341                                                    (003-59)
Rule     a step of m parts on p stages takes max(m, p) times what a stage needs for one of them: the next step of the first part
         begins while the others are still under way.  Of `parked` of the weights, which lie with a neighbour, what the link
         takes longer for than the stage computes shows
Units    stages: devices in a row; micro: parts of a batch; parked: share of the weights
Cost     as roofline
Pays     over a pipeline with a barrier after each step, whose bubble is (p - 1) / m
Differs  the engine plans a step for all parts at once, so this is the time of a steady state; sequences have no padding anyway
Raises   ValueError for a share outside (0, 1], parked outside [0, 1), stages < 1 or micro < 1
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


@register("cost", "energonai")
@dataclass(frozen=True, slots=True, kw_only=True)
class EnergonAI:
    """A pipeline that stays full."""

    stages: int = 2
    micro: int = 4
    parked: float = 0.0
    compute: float = 0.65
    memory: float = 0.8
    attention: float = 0.4
    dtype: str = "bfloat16"
    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()
    claim: ClassVar[Claim] = Claim(
        "10 % better scaling of a pipeline than with a barrier after each batch", "output_tok_s", 1.1, "more",
        against="megatron", case="stages",
    )  # fmt: skip

    def __post_init__(self) -> None:
        shares = (self.compute, self.memory, self.attention)
        if min(self.stages, self.micro) < 1 or not 0 <= self.parked < 1 or not all(0 < x <= 1 for x in shares):
            raise ValueError(
                "stages and micro are at least 1, parked is from 0 to 1, and the shares are above 0 and at most 1"
            )

    def on(self, hardware: Hardware, model: Figures) -> Callable[[Load], Parts]:
        rates = Rates(hardware, model, self.dtype, self.compute, self.memory, self.attention)
        link, host_s, p = hardware.link, hardware.launch_s, self.stages
        fetched_s = self.parked * model.stored_bytes / p / link.bytes_s

        def price(load: Load) -> Parts:
            m = max(1, min(self.micro, load.works))
            turns = max(m, p) / p
            weights = attention = kv = 0.0
            for o in rates.operators(load):
                if not o.attention:
                    weights += max(o.compute_s / m, o.memory_s) * turns
                elif o.compute_s > o.memory_s:
                    attention += o.compute_s / m * turns
                else:
                    kv += o.memory_s / m * turns
            told = rates.ring_s(load.whole_rows)
            if p > 1 and load.rows:
                hop = load.whole_rows / m * model.width * model.value_bytes / link.bytes_s + link.latency_s
                told += max(0.0, hop - (weights + attention + kv) / max(m, p)) * max(m, p) + hop
            told += max(0.0, fetched_s - weights - attention - kv) if load.rows else 0.0
            return Parts(weights, attention, kv, told, host_s + load.works * 2e-6)

        return price
