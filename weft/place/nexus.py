"""Nexus: prompts and answers beside each other on one device, whose units are shared anew every few steps by a model of cost.

Paper    Shi et al., Nexus, arXiv:2507.06608                                                       (000-44)
Rule     prompts get the largest share with which a step of answers takes at most (1 + slack) of what it would alone on the
         whole device; where KV use exceeds `full`, answers get the largest share with which a step of prompts stays within (1 +
         slack) of its own; a share is changed only by `least` or more, every `every` steps; who is alone has everything
Units    slack: share of a step's time; full: share of the KV pool; least: share of the device's units; every: steps
Cost     ten prices every few steps
Pays     where prompts multiply while answers read memory: the two hardly meet on a device
Differs  the cost is the simulator's own (`weft/sim/beside.py`), with a saturation of all units alike rather than one for each
         class of operators; prompts are ordered by the schedule (`shortest` has ageing), not within this file
Raises   ValueError for slack < 0, a share outside (0, 1) or every < 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.slots import Claim
from weft.slots.place import Couple, Phase, Share
from weft.traits import Traits

SHARES = [i / 10 for i in range(9, 0, -1)]


@register("place", "nexus")
@dataclass(slots=True, kw_only=True)
class Nexus:
    """Shares that are planned ahead of contention."""

    slack: float = 0.5
    full: float = 0.85
    least: float = 0.15
    every: int = 4
    _at: dict[int, tuple[int, float]] = field(default_factory=dict, init=False, compare=False)
    acts: dict[str, int] = field(
        default_factory=lambda: {"entered": 0, "planned": 0, "shifted": 0}, init=False, compare=False
    )
    traits: ClassVar[Traits] = Traits()
    couple: ClassVar[int] = 1
    exposed: ClassVar[float] = 0.0
    flips: ClassVar[bool] = False
    claim: ClassVar[Claim] = Claim(
        "up to 2.2 times the throughput within limits of chunks beside decodes", "goodput", 2.2, "more", case="beside",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.slack < 0 or not (0 < self.full < 1 and 0 < self.least < 1) or self.every < 1:
            raise ValueError("slack is not below 0, full and least are between 0 and 1, and every is at least 1")

    def enter(self, prompt: int, couples: Sequence[Couple], now: float) -> int:
        self.acts["entered"] += 1
        return min(
            range(len(couples)), key=lambda i: (couples[i].work("prefill").pending, couples[i].work("decode").used, i)
        )

    def share(self, phase: Phase, couple: Couple, index: int, now: float) -> Share:
        if not couple.busy("decode" if phase == "prefill" else "prefill"):
            return Share()
        steps, x = self._at.get(index, (0, 0.5))
        if steps % self.every == 0:
            self.acts["planned"] += 1
            wanted = self._planned(couple)
            if abs(wanted - x) >= self.least:
                self.acts["shifted"] += 1
                x = wanted
        self._at[index] = (steps + 1, x)
        return Share(compute=x if phase == "prefill" else 1 - x)

    def _planned(self, couple: Couple) -> float:
        """The share of prompts."""
        if couple.work("decode").used > self.full:
            bound = (1 + self.slack) * couple.predict("prefill", 1.0, alone=True)
            return next((x for x in reversed(SHARES) if couple.predict("prefill", x) <= bound), SHARES[0])
        bound = (1 + self.slack) * couple.predict("decode", 1.0, alone=True)
        return next((x for x in SHARES if couple.predict("decode", 1 - x) <= bound), SHARES[-1])
