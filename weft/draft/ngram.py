"""Prompt lookup: what followed the newest tokens the last time they stood in the context.

Paper    Yang et al., Inference with Reference, arXiv:2304.04487; Saxena, Prompt Lookup Decoding, 2023
Rule     for n = longest down to shortest: where the last n tokens stood before, most recently, guess the tokens after them
Shapes   context [T] int64, guesses at most `guesses`
Units    longest, shortest, guesses: tokens
Cost     O(T) comparisons for each proposal, no state, no second model; guessed rows are computed and may be thrown away
Pays     where answers repeat their prompts: summaries, code edits, retrieval, agents' transcripts
Differs  the most recent occurrence is taken, where the first was proposed; guesses end where the occurrence meets the newest
         tokens
Raises   ValueError unless 1 <= shortest <= longest and guesses >= 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from weft.registry import register
from weft.slots import Ask, Forward, Guesses
from weft.traits import Effect, Trait, Traits

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@register("draft", "ngram")
@dataclass(frozen=True, slots=True, kw_only=True)
class NGram:
    """A draft that needs no model."""

    longest: int = 3
    shortest: int = 2
    guesses: int = 5
    acts: dict[str, int] = field(default_factory=lambda: {"proposed": 0, "accepted": 0}, init=False, compare=False)
    model: ClassVar[str | None] = None
    per_request: ClassVar[bool] = True
    traits: ClassVar[Traits] = Traits(needs=frozenset({Trait.ROLLBACK}), effects=frozenset({Effect.GUESSES}))

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest or self.guesses < 1:
            raise ValueError(
                f"1 <= shortest <= longest and guesses >= 1 are needed, got {self.shortest}, {self.longest}, {self.guesses}"
            )

    def propose(self, asks: Sequence[Ask], run: Forward | None) -> list[Guesses]:
        return [Guesses(self._after(ask.context)[: ask.most]) for ask in asks]

    def _after(self, context: npt.NDArray[np.int64]) -> Sequence[int]:
        """What followed the newest tokens before."""
        for n in range(min(self.longest, len(context) - 1), self.shortest - 1, -1):
            # Candidates end before the newest token, so that at least one token follows them.
            same = context[n - 1 : -1] == context[-1]
            for back in range(1, n):
                same = same & (context[n - 1 - back : -1 - back] == context[-1 - back])
            found = same.nonzero()[0]
            if len(found):
                after = int(found[-1]) + n
                guesses: list[int] = context[after : after + self.guesses].tolist()
                # A vector or media position has no id that could be guessed.
                return guesses[: guesses.index(-1)] if -1 in guesses else guesses
        return ()

    def observe(self, proposed: int, accepted: int) -> None:
        self.acts["proposed"] += proposed
        self.acts["accepted"] += accepted
