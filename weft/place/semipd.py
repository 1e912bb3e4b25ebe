"""semi-PD: prompts and answers are two workers on one device, whose units they share in a ratio that follows the limits.

Paper    Hong et al., semi-PD, arXiv:2504.19867                                                    (002-29)
Rule     prompts have the share x of the units and answers 1 - x; every `every_s`, x grows by `step` where the time to the first
         token is further above its limit than the time between tokens is above its own, and falls by it where it is the other
         way round; where neither exceeds its limit, x stays
Units    share, step: of the device's execution units; ttft_s, tpot_s, every_s: seconds
Cost     O(1) a step; each worker reads the weights by itself
Pays     where both limits are tight: no KV moves, and neither phase waits for the other's steps
Differs  shares of a worker without work stay unused, as they do with fixed partitions; a ratio changes at once; what a share
         brings is computed (`weft/sim/beside.py`), not measured
Raises   ValueError for a share or step outside (0, 1), or a time that is not above 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.slots import Claim
from weft.slots.place import Couple, Phase, Share
from weft.traits import Traits

LEAST = 0.1


@register("place", "semipd")
@dataclass(slots=True, kw_only=True)
class SemiPD:
    """One copy of weights and KV, two workers."""

    split: float = 0.6
    step: float = 0.1
    ttft_s: float = 1.0
    tpot_s: float = 0.05
    every_s: float = 1.0
    _at: dict[int, tuple[float, float]] = field(default_factory=dict, init=False, compare=False)
    acts: dict[str, int] = field(default_factory=lambda: {"entered": 0, "shifted": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits()
    couple: ClassVar[int] = 1
    exposed: ClassVar[float] = 0.0
    flips: ClassVar[bool] = False
    claim: ClassVar[Claim] = Claim(
        "1.55 to 1.72 times the requests within limits", "goodput", 1.55, "more", case="beside",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not (0 < self.split < 1 and 0 < self.step < 1):
            raise ValueError(f"split and step are between 0 and 1, got {self.split} and {self.step}")
        if min(self.ttft_s, self.tpot_s, self.every_s) <= 0:
            raise ValueError("ttft_s, tpot_s and every_s are above 0")

    def enter(self, prompt: int, couples: Sequence[Couple], now: float) -> int:
        self.acts["entered"] += 1
        return min(
            range(len(couples)), key=lambda i: (couples[i].work("prefill").pending, couples[i].work("decode").used, i)
        )

    def share(self, phase: Phase, couple: Couple, index: int, now: float) -> Share:
        since, x = self._at.get(index, (now, self.split))
        if now >= since + self.every_s:
            first, between = couple.ttft_s / self.ttft_s, couple.tpot_s / self.tpot_s
            if max(first, between) > 1:
                moved = min(1 - LEAST, max(LEAST, x + (self.step if first > between else -self.step)))
                self.acts["shifted"] += moved != x
                x = moved
            since = now
        self._at[index] = (since, x)
        return Share(compute=x if phase == "prefill" else 1 - x)
