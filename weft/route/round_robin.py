"""Round robin: each replica in turn.

Paper    none; the null of the slot
Rule     request i goes to replica i modulo the number of replicas
Units    none
Cost     O(1)
Pays     where replicas are alike and requests short; it needs no news of anybody
Differs  nothing
Raises   nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.slots.route import ReplicaView
from weft.traits import Traits


@register("route", "round_robin")
@dataclass(slots=True)
class RoundRobin:
    acts: dict[str, int] = field(default_factory=lambda: {"routed": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits()
    looks: ClassVar[bool] = False

    def choose(self, prompt: Sequence[int], tenant: bytes, replicas: Sequence[ReplicaView], now: float) -> int:
        self.acts["routed"] += 1
        return (self.acts["routed"] - 1) % len(replicas)
