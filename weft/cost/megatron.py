"""Megatron: layers in stages on several devices, and a step in micro-batches that follow each other through them.

Paper    Narayanan et al., Megatron-LM, arXiv:2104.04473; Du et al., EnergonAI, arXiv:2209.02341   (003-34, 003-59)
Rule     a step of m micro-batches on p stages takes (m + p - 1) times what a stage needs for one of them, a bubble of
         (p - 1) / m; activations go from stage to stage, p - 1 times a micro-batch
Units    stages: devices in a row; micro: parts of a batch
Cost     as roofline
Pays     for models that one device does not hold where the link is slow: rows go over it once a stage, not twice a layer
Differs  one step is in the pipeline at a time, so bubbles stand at each of its ends; micro-batches are of equal cost; layers of a
         stage are not interleaved; memory is that of --devices, so KV blocks of a longer row are given by --kv-blocks
Raises   ValueError for a share outside (0, 1], stages < 1 or micro < 1
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


@register("cost", "megatron")
@dataclass(frozen=True, slots=True, kw_only=True)
class Megatron:
    """Pipeline parallelism; with several --devices each stage is spread over so many."""

    stages: int = 2
    micro: int = 4
    compute: float = 0.65
    memory: float = 0.8
    attention: float = 0.4
    dtype: str = "bfloat16"
    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()
    claim: ClassVar[Claim] = Claim(
        "a pipeline of p stages loses (p - 1) / m of its time to the bubble, and nothing else", "output_tok_s", 0.8, "more",
        case="stages", devices=2,
    )  # fmt: skip

    def __post_init__(self) -> None:
        shares = (self.compute, self.memory, self.attention)
        if self.stages < 1 or self.micro < 1 or not all(0 < x <= 1 for x in shares):
            raise ValueError("stages and micro are at least 1, and the shares are above 0 and at most 1")

    def on(self, hardware: Hardware, model: Figures) -> Callable[[Load], Parts]:
        rates = Rates(hardware, model, self.dtype, self.compute, self.memory, self.attention)
        link, host_s = hardware.link, hardware.launch_s
        p = self.stages

        def price(load: Load) -> Parts:
            m = max(1, min(self.micro, load.works))
            turns = (m + p - 1) / p
            weights = attention = kv = 0.0
            for o in rates.operators(load):
                # One micro-batch has its share of the arithmetic and of the entries, and reads all weights of a stage.
                if not o.attention:
                    weights += max(o.compute_s / m, o.memory_s) * turns
                elif o.compute_s > o.memory_s:
                    attention += o.compute_s / m * turns
                else:
                    kv += o.memory_s / m * turns
            rows = load.whole_rows / m
            hop = rows * model.width * model.value_bytes / link.bytes_s + link.latency_s
            told = (m + p - 2) * hop if p > 1 and rows else 0.0
            told += rates.ring_s(load.whole_rows)
            kv += load.stored * model.block_bytes / hardware.host_link.bytes_s
            return Parts(weights, attention, kv, told, host_s + load.works * 2e-6)

        return price
