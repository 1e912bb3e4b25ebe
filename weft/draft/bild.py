"""BiLD's fallback: a small model writes ahead while it is sure, and hands over to the target where it is not.

Paper    Kim et al., Speculative Decoding with Big Little Decoder, arXiv:2302.07863 (004-15)
Rule     q the draft model's law at temperature 1.  Before each guess: where max q < fallback, the target writes that token, and
         there is no guess for it nor behind it; else the guess is drawn from q under the request's own law
Shapes   logits [sequences that still guess, vocab] in each pass; sequences stop at different places, and no row is padding
Units    fallback: a probability.  guesses: tokens
Cost     a pass of the draft model for each guess, and one for a guess that is not made; its weights and KV; guessed rows of the
         target that are thrown away
Pays     where a guess that falls costs much beside a step: of guesses on held-out prose 0.71 stand at temperature 0.8 and 0.95
         greedily with fallback=0.3, where 0.53 and 0.72 of speculative_sampling's do; but it makes one in two steps, so that a
         step gives 1.2 and 1.5 tokens for 2.0 and 2.7.  The bundled draft is seldom sure: lower thresholds make more guesses.  In
         time it does not pay for one sequence: on the 0.5B shape fallback 0.1 is 1.53 times as fast as none (greedily 2.00), 0.3
         1.16 (1.36), and four guesses in every step 1.76 (2.27); with accept=bild 1.77 (2.05).  With four sequences 1.02 to 1.21,
         where four guesses bring 1.21 and 1.30; with accept=bild 1.23 and 1.54
Differs  at most `guesses` tokens stand between two passes of the target, which the paper leaves open.  Guesses end at an end id.
         Which of them stand is the slot `accept`: the paper's own rule is accept=bild, and with any other this is a draft whose
         length hangs on how sure it is
Raises   ValueError unless 1 <= guesses <= 32 and 0 <= fallback <= 1, or where model is empty
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from weft.draft._common import chained
from weft.registry import register
from weft.slots import Ask, Forward, Guesses
from weft.traits import Effect, Trait, Traits

MOST = 32


@register("draft", "bild")
@dataclass(frozen=True, slots=True, kw_only=True)
class BiLD:
    """fallback: how likely the draft's likeliest token must be, the paper's alpha_FB.  guesses: at most in a step.
    model: the draft's checkpoint."""

    fallback: float = 0.3
    guesses: int = 8
    model: str = "bundled"
    acts: dict[str, int] = field(
        default_factory=lambda: {"proposed": 0, "accepted": 0, "draft_rows": 0, "handed_over": 0},
        init=False,
        compare=False,
    )
    per_request: ClassVar[bool] = True
    trial: ClassVar[dict[str, object]] = {"guesses": 4, "fallback": 0.2}
    traits: ClassVar[Traits] = Traits(
        needs=frozenset({Trait.ROLLBACK, Trait.SECOND_MODEL}), effects=frozenset({Effect.GUESSES})
    )

    def __post_init__(self) -> None:
        if not 1 <= self.guesses <= MOST:
            raise ValueError(f"guesses must be from 1 to {MOST}, got {self.guesses}")
        if not 0 <= self.fallback <= 1:
            raise ValueError(f"fallback is a probability, got {self.fallback}")
        if not self.model:
            raise ValueError("the draft model's name is empty; leave it out for the one that comes with weft")

    def propose(self, asks: Sequence[Ask], run: Forward | None) -> list[Guesses]:
        assert run is not None
        return chained(asks, run, [min(self.guesses, ask.most) for ask in asks], self.acts, self._sure)

    def observe(self, proposed: int, accepted: int) -> None:
        self.acts["proposed"] += proposed
        self.acts["accepted"] += accepted

    def _sure(self, logits_NV: Any) -> list[bool]:
        """Of each row, whether the draft goes on."""
        best = (logits_NV.amax(-1).float() - logits_NV.float().logsumexp(-1)).exp()
        sure: list[bool] = (best >= self.fallback).tolist()
        self.acts["handed_over"] += sure.count(False)
        return sure
