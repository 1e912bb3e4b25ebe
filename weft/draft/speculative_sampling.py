"""Speculative sampling: a smaller model of the same vocabulary writes ahead, and the target verifies it in one pass.

Paper    Chen et al., Accelerating Large Language Model Decoding with Speculative Sampling, arXiv:2302.01318 (002-111); Qian et
         al., BASS: Batched Attention-optimized Speculative Sampling, arXiv:2404.15778 (002-122)
Rule     the draft model computes what has been accepted and then, one token a pass, `guesses` tokens of its own, each drawn from
         its law under the request's own temperature, truncation, bias and penalties.  adapt: one length l for the whole batch;
         l + 2 after a step in which some sequence accepted all of l, else l - ceil(l / 10), and one less again where the step
         before shrank it too, but never below 1 nor the most that was accepted (BASS, algorithm 1)
Shapes   logits [sequences that still guess, vocab] in each pass; sequences accept different numbers, and no row is padding
Units    guesses: tokens
Cost     a pass of the draft model for each guess, over all sequences at once; its weights and KV; guessed rows of the target
         that are thrown away
Pays     for single sequences, where the draft costs little beside the target and a step of several rows hardly more than one of
         a single row: on the 0.5B shape with the kernels 1.7 to 1.9 times the speed with 4 guesses at temperature 0.8, greedily
         2.3; with four sequences 1.2 to 1.5, there better with 2 guesses than with 4 (1.45 to 1.62).  Not beside the bundled
         model itself, of which the draft is a third (0.73 to 0.95)
Differs  a guess is drawn by the noise of the very token that it guesses, so that under accept=race it stands exactly when the
         target's law gives that token too: seeds keep their tokens.  Under an accept that weighs laws it is drawn by noise of
         its own, as in the paper.  Guesses end at an end id.  adapt starts at `guesses`, where BASS starts at 7, and a sequence
         whose guesses were cut short by a budget tells nothing when all of them stood
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
STEP = 2
SHARE = 10
"""BASS's constants: the longest draft, by how much it grows, and the part of it by which it shrinks."""


@register("draft", "speculative_sampling")
@dataclass(slots=True, kw_only=True)
class SpeculativeSampling:
    """Pays where the target is large beside its draft and few sequences run: a pass then costs the same for one row or five.

    guesses: tokens drafted a step (with adapt, in the first one).  model: the draft's checkpoint.  adapt: BASS's rule.
    """

    guesses: int = 4
    model: str = "bundled"
    adapt: bool = False
    acts: dict[str, int] = field(
        default_factory=lambda: {"proposed": 0, "accepted": 0, "draft_rows": 0}, init=False, compare=False
    )
    length: int = field(default=0, init=False, compare=False)
    """Tokens to draft in the next step."""
    _shrank: int = field(default=0, init=False, compare=False)
    _seen: list[tuple[int, int]] = field(default_factory=list, init=False, compare=False)
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
        self.length = self.guesses
        if self.adapt:
            self.guesses = MOST

    def propose(self, asks: Sequence[Ask], run: Forward | None) -> list[Guesses]:
        assert run is not None
        self._adapt()
        return chained(asks, run, [min(self.length, ask.most) for ask in asks], self.acts)

    def observe(self, proposed: int, accepted: int) -> None:
        self.acts["proposed"] += proposed
        self.acts["accepted"] += accepted
        if self.adapt:
            self._seen.append((proposed, accepted))

    def _adapt(self) -> None:
        """The next draft length out of what the last step accepted."""
        told = [accepted for proposed, accepted in self._seen if accepted < proposed or proposed >= self.length]
        self._seen.clear()
        if not told:
            return
        if max(told) >= self.length:
            self.length, self._shrank = min(self.length + STEP, MOST), 0
        else:
            shorter = self.length - -(-self.length // SHARE) - self._shrank
            self.length, self._shrank = max(1, shorter, *told), 1
