"""LRU: the cached block that was let go longest ago goes first.

Paper    none; the null of the slot
Rule     rank(block) = the order in which the block was last let go
Units    rank: a count, no unit
Cost     O(1) state for each block
Differs  nothing
Raises   nothing
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.traits import Traits


@register("kv.evict", "lru")
@dataclass(slots=True)
class LRU:
    """Least recently used.  A hit takes a block out of the cached ones, so its release is its last use."""

    traits: ClassVar[Traits] = Traits()
    _clock: int = field(default=0, init=False)
    _last: dict[int, int] = field(default_factory=dict, init=False)

    def observe(self, block: int, event: str, now: float) -> None:
        if event == "release":
            self._clock += 1
            self._last[block] = self._clock
        elif event == "evict":
            self._last.pop(block, None)

    def rank(self, block: int, now: float) -> float:
        return float(self._last.get(block, 0))
