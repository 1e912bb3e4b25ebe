"""The race: a guess stands exactly when the race selects it.

Paper    none; the null of the slot, and the rule under which speculation keeps every token of a seed
Rule     tokens = winner(0); while some guess that follows what stands equals the newest token: accept it, and take the winner
         of its row
Units    tokens
Cost     one draw for each row that is reached
Differs  nothing
Raises   nothing
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from weft.registry import register
from weft.slots import Verify
from weft.traits import Traits


@register("accept", "race")
@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """Equal tokens with and without guesses, greedy and seeded: the noise of a token is not the draft's."""

    traits: ClassVar[Traits] = Traits()
    per_request: ClassVar[bool] = True
    laws: ClassVar[bool] = False

    def accept(self, view: Verify) -> tuple[list[int], list[int]]:
        tokens, path, at = [view.winner(0)], list[int](), -1
        while True:
            hit = next((j for j, p in enumerate(view.parents) if p == at and view.guesses[j] == tokens[-1]), None)
            if hit is None:
                return tokens, path
            path.append(hit)
            tokens.append(view.winner(1 + hit))
            at = hit
