"""PEARL: the draft model writes on while the target verifies what it wrote before, and neither waits for the other.

Paper    Liu et al., PEARL: Parallel Speculative Decoding with Adaptive Draft Length, arXiv:2408.11850 (002-50)
Rule     post-verify: while the target computes the newest token and its k guesses, the draft model computes them too and goes
         on: a token in the place of the target's own next one, and `guesses` more.  Where all k stand, and then that token,
         these are verified next.  pre-verify: after a guess that fell there is nothing in hand, k = 0; the target computes one
         row, and what the draft model writes meanwhile is kept where its first token is the target's
Shapes   logits [sequences that still guess, vocab] in each pass, as with draft=speculative_sampling
Units    guesses: tokens.  kept: times that what was written ahead was verified
Cost     guesses + 1 passes of the draft model beside each pass of the target, most of them thrown away where guesses fall; its
         weights and KV, and a thread; guessed rows of the target that are thrown away
Pays     where the draft model computes on what the target leaves free, and a guess takes more than a tenth of the target's pass:
         guesses that stand with chance a bring 1 + a^2 (1 - a^k) / (1 - a) / (1 + a - a^(k + 1)) tokens a pass, against
         (1 - a^(k + 1)) / (1 - a) of drafts that take turns, whose pass is longer by k guesses.  Not on two cores: the 0.5B
         shape, one sequence, 4 guesses of the draft that ships, 1.5 times no draft, and 2.1 in turns
Differs  the paper's two devices are two threads: the draft model has one of its own.  A guess is drawn by the noise of the very
         token that it guesses, so that under accept=race it stands exactly when the target's law gives that token too; under an
         accept that weighs laws by noise of its own, and the token in the place of the target's is weighed like a guess.  How
         far ahead is written adapts by --draft-control and by what stands, not by the ratio of two speeds.  With kv.store and
         on a GPU the two models take turns, at the same tokens
Raises   ValueError unless 1 <= guesses <= 32, or where model is empty
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.draft._common import chained
from weft.registry import register
from weft.slots import Ask, Forward, Guesses
from weft.traits import Effect, Trait, Traits

MOST = 32


@register("draft", "pearl")
@dataclass(slots=True, kw_only=True)
class Pearl:
    """guesses: tokens drafted a step, but for the one in the place of the target's own.  model: the draft's checkpoint."""

    guesses: int = 4
    model: str = "bundled"
    acts: dict[str, int] = field(
        default_factory=lambda: {"proposed": 0, "accepted": 0, "draft_rows": 0, "kept": 0}, init=False, compare=False
    )
    per_request: ClassVar[bool] = True
    trial: ClassVar[dict[str, object]] = {"guesses": 3}
    traits: ClassVar[Traits] = Traits(
        needs=frozenset({Trait.ROLLBACK, Trait.SECOND_MODEL}), effects=frozenset({Effect.GUESSES})
    )

    def __post_init__(self) -> None:
        if not 1 <= self.guesses <= MOST:
            raise ValueError(f"guesses must be from 1 to {MOST}, got {self.guesses}")
        if not self.model:
            raise ValueError("the draft model's name is empty; leave it out for the one that comes with weft")

    def early(self, asks: Sequence[Ask], run: Forward) -> list[Guesses]:
        return chained(asks, run, [min(self.guesses + 1, ask.most) for ask in asks], self.acts)

    def propose(self, asks: Sequence[Ask], run: Forward | None) -> list[Guesses]:
        kept = [ask.kept for ask in asks]
        self.acts["kept"] += sum(one is not None and len(one.tokens) > 0 for one in kept)
        return [Guesses(()) if one is None else one for one in kept]

    def observe(self, proposed: int, accepted: int) -> None:
        self.acts["proposed"] += proposed
        self.acts["accepted"] += accepted
