"""AcceLLM: devices in pairs that both have the KV of every request, so that either may go on with it at once.

Paper    Bournias et al., AcceLLM, arXiv:2411.05555                                                (002-141)
Rule     a prompt goes to the pair with the least to do; while it has prompts, one of its devices computes them and the other
         one answers for all; while it has none, both answer for half of its sequences; each new entry is sent to the other
         device
Units    layers: of the model, whose last one's transfer is not hidden; each: rows that a sequence stands for
Cost     KV lies on both devices of a pair while there is room; where memory is short, copies of those who came last are dropped
         first, and while one device computes prompts, what lies there alone waits
Pays     where prompts come in bursts: no device waits for its phase
Differs  sequences are halved by number and entries alike; of those without a copy every second one lies on the device that
         computes prompts, and none moves
Raises   ValueError if layers < 1 or each < 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.slots import Claim
from weft.slots.place import Couple, Phase, Share
from weft.traits import Traits


@register("place", "accellm")
@dataclass(slots=True, kw_only=True)
class AcceLLM:
    """Redundancy, so that work can go to either."""

    layers: int = 32
    each: int = 128
    acts: dict[str, int] = field(
        default_factory=lambda: {"entered": 0, "halved": 0, "dropped": 0}, init=False, compare=False
    )
    traits: ClassVar[Traits] = Traits()
    couple: ClassVar[int] = 2
    flips: ClassVar[bool] = False
    claim: ClassVar[Claim] = Claim(
        "up to 30 % shorter latency than fixed pools", "e2e_s.mean", 0.7, "less", against="splitwise", case="disaggregated",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.layers < 1 or self.each < 0:
            raise ValueError(f"layers is at least 1 and each not below 0, got {self.layers} and {self.each}")

    @property
    def exposed(self) -> float:
        return 1.0 / self.layers

    def enter(self, prompt: int, couples: Sequence[Couple], now: float) -> int:
        self.acts["entered"] += 1

        def before(i: int) -> int:
            one, other = couples[i].work("prefill"), couples[i].work("decode")
            return one.pending + self.each * (one.waiting + other.running + other.waiting)

        return min(range(len(couples)), key=lambda i: (before(i), i))

    def alone(self, blocks: Sequence[int], room: int) -> Sequence[int]:
        kept, left = set[int](), 2 * room - sum(blocks)
        for i, held in enumerate(blocks):
            if held <= left:
                kept.add(i)
                left -= held
        found = [i for i in range(len(blocks)) if i not in kept]
        self.acts["dropped"] += len(found)
        return found

    def share(self, phase: Phase, couple: Couple, index: int, now: float) -> Share:
        if phase == "prefill" or couple.busy("prefill"):
            return Share()
        self.acts["halved"] += 1
        return Share(ways=2)
