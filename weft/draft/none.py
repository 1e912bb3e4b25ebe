"""No guesses: each step gives one token.

Paper    none; the null of the slot, and how a request declines the server's guesses
Rule     nothing is proposed
Units    none
Cost     nothing
Differs  nothing
Raises   nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from weft.registry import register
from weft.slots import Ask, Forward, Guesses
from weft.traits import Traits


@register("draft", "none")
@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    """Plain decoding."""

    model: ClassVar[str | None] = None
    guesses: ClassVar[int] = 0
    per_request: ClassVar[bool] = True
    traits: ClassVar[Traits] = Traits()

    def propose(self, asks: Sequence[Ask], run: Forward | None) -> list[Guesses]:
        return [Guesses(())] * len(asks)

    def observe(self, proposed: int, accepted: int) -> None:
        """Nothing was proposed."""
