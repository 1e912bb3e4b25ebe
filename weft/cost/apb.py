"""APB: each of several hosts attends to the beginning, to its own block, and to the few entries that those before it pass on.

Paper    Huang et al., APB, arXiv:2502.12085                                                       (002-124)
Rule     of prompts with at least `least` rows in a step each host takes l = rows / H, and an anchor of `anchor` l rows beside
         them; a row meets its block causally, the anchor, and `passing` l entries of each host before it; the last host's time
         is the step's. In each layer every host gets the passed entries of the others
Units    ranks: hosts (H); anchor, passing: shares of a host's block; least: rows
Cost     approximate attention: what it loses in quality is not priced
Pays     for prompts so long that attention is most of their cost
Differs  a step's prompts are taken as one; choosing the entries takes no time; decodes attend exactly, 1/H on each host
Raises   ValueError for a share outside (0, 1], or ranks or least below 1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from weft.cost._common import Rates, by_rows
from weft.registry import register
from weft.slots import Claim
from weft.slots.cost import Figures, Hardware, Load, Parts
from weft.traits import Traits


@register("cost", "apb")
@dataclass(frozen=True, slots=True, kw_only=True)
class APB:
    """Compressed blocks between hosts."""

    ranks: int = 2
    anchor: float = 0.25
    passing: float = 0.125
    least: int = 1024
    compute: float = 0.65
    memory: float = 0.8
    attention: float = 0.4
    dtype: str = "bfloat16"
    acts: ClassVar[dict[str, int]] = {}
    traits: ClassVar[Traits] = Traits()
    claim: ClassVar[Claim] = Claim(
        "prompts up to 4.2 times as fast as with ring attention", "ttft_s.mean", 1 / 4.2, "less",
        against="contextparallel", case="long",
    )  # fmt: skip

    def __post_init__(self) -> None:
        shares = (self.compute, self.memory, self.attention)
        if (
            self.ranks < 1
            or self.least < 1
            or not (0 <= self.anchor <= 1 and 0 <= self.passing <= 1)
            or not all(0 < x <= 1 for x in shares)
        ):
            raise ValueError(
                "ranks and least are at least 1, anchor and passing from 0 to 1, and the shares are above 0 and at most 1"
            )

    def on(self, hardware: Hardware, model: Figures) -> Callable[[Load], Parts]:
        rates = Rates(hardware, model, self.dtype, self.compute, self.memory, self.attention)
        link, host_s, n = hardware.link, hardware.launch_s, self.ranks

        def price(load: Load) -> Parts:
            prompts = load.rows - load.decode_rows
            if n == 1 or prompts < self.least:
                return by_rows(rates, load, n).split(rates.ring_s(load.whole_rows / n), host_s + load.works * 2e-6)
            block = prompts / n
            anchor, passed = self.anchor * block, self.passing * block
            more = anchor * anchor / 2 + block * (anchor + (n - 1) * passed)
            own = replace(
                load, rows=load.rows + round(anchor * n), prompt_pairs=[x / n + more * n for x in load.prompt_pairs],
                prompt_entries=[x / n + (anchor + (n - 1) * passed) * n for x in load.prompt_entries],
            )  # fmt: skip
            sent = (n - 1) * passed * sum(k.entry_bytes for k in model.kinds)
            told = rates.ring_s(own.whole_rows / n) + sent / link.bytes_s + model.layers * link.latency_s
            return by_rows(rates, own, n).split(told, host_s + load.works * 2e-6)

        return price
