"""DEL: the target's first layers guess, and how many of them, and how far ahead, is chosen in every step.

Paper    Zarch et al., DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding, arXiv:2504.05598 (000-24)
Rule     the head, put on what comes out of layer l, guesses; all L layers verify.  a_l: how often shadow tokens (what an exit
         after l layers would have said at the rows that the target has just sampled) were the tokens that stood, the older
         ones counting less.  Of the exits and of d = 0 .. guesses those with the most tokens for a layer are taken,
         TPL(l, d) = (1 - a_l^(d + 1)) / ((1 - a_l) (d l + L)).  Exits: after a quarter, a half and three quarters of the layers
Shapes   hidden [rows that sample, width] at each exit of a step; logits [sequences that still guess, vocab] in each pass
Units    guesses: tokens.  exit: layers
Cost     d passes of l layers and of the head; in steps that look, a product with the head for each exit and each token that
         stood, and the target's pass is cut in four.  No second model and no KV of its own: the first layers write into the
         target's cache, in room that a plan grants
Pays     for models that were trained to leave early.  The bundled one was not: after 2, 4 and 6 of its 8 layers a guess stands
         0.23, 0.31 and 0.48 of the time, where 2 layers would have to be right 0.25 of the time to pay for themselves at all.
         So the choice is to guess nothing, and costs 0.09 to 0.17 of its speed for asking, of the grown 0.5B shape's next to
         nothing with one sequence and up to 0.15 with four; guessing anyway costs more
Differs  one exit and one d for all sequences of a step, by the mean of their a_l; a_l of a new sequence begins with what it was
         for all others; while d is 0, shadow tokens are made in every eighth step; a draft is not ended early by its confidence.
         With exit named, guesses are always as many as there may be.  Noise as in draft=speculative_sampling
Raises   ValueError unless 1 <= guesses <= 16 and exit >= 0; ConfigError where the model has no such exit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.draft._common import chained
from weft.errors import ConfigError
from weft.registry import register
from weft.slots import Ask, FirstLayers, Guesses
from weft.traits import Effect, Trait, Traits

MOST = 16
OWN, ALL = 0.95, 0.99
"""What a shadow token leaves of those before it: of the sequence's own, and of all sequences."""
HOPE, PRIOR = 0.6, 4.0
"""What is thought of an exit before any was seen; tokens that what is known of all sequences counts for with a new one."""
LOOK = 8
"""While nothing is guessed, shadow tokens are made in every so many steps."""


@register("draft", "early_exit")
@dataclass(slots=True, kw_only=True)
class EarlyExit:
    """guesses: the most for a sequence in a step.  exit: layers that guess, 0 to choose in every step."""

    guesses: int = 8
    exit: int = 0
    acts: dict[str, int] = field(
        default_factory=lambda: {"proposed": 0, "accepted": 0, "draft_rows": 0}, init=False, compare=False
    )
    _all: dict[int, tuple[float, float]] = field(default_factory=dict, init=False, compare=False)
    """By exit (stood, tried), over all sequences."""
    _length: int = field(default=1, init=False, compare=False)
    """Guesses that were chosen in the last step."""
    _steps: int = field(default=0, init=False, compare=False)
    model: ClassVar[None] = None
    per_request: ClassVar[bool] = False
    trial: ClassVar[dict[str, object]] = {"guesses": 3}
    traits: ClassVar[Traits] = Traits(needs=frozenset({Trait.ROLLBACK}), effects=frozenset({Effect.GUESSES}))

    def __post_init__(self) -> None:
        if not 1 <= self.guesses <= MOST or self.exit < 0:
            raise ValueError(f"1 <= guesses <= {MOST} and exit >= 0 are needed, got {self.guesses}, {self.exit}")

    def exits(self, layers: int) -> tuple[int, ...]:
        """Raises ConfigError."""
        if self.exit >= layers or layers < 2:
            raise ConfigError(
                f"draft=early_exit guesses by the first layers, and this model has {layers}; name an exit below that"
            )
        return (self.exit,) if self.exit else tuple(sorted({max(1, layers * k // 4) for k in (1, 2, 3)}))

    def propose(self, asks: Sequence[Ask], run: FirstLayers | None) -> list[Guesses]:
        assert run is not None
        most = [min(self.guesses, ask.most) for ask in asks]
        if not self.exit:
            self._steps += 1
            if self._length or self._steps % LOOK == 0:
                run.exit, self._length = best(self._hopes(asks, run), max(most, default=0), run.layers)
            run.look = self._length > 0 or (self._steps + 1) % LOOK == 0
            most = [min(m, self._length) for m in most]
        return chained(asks, run, most, self.acts)

    def observe(self, proposed: int, accepted: int) -> None:
        self.acts["proposed"] += proposed
        self.acts["accepted"] += accepted

    def _hopes(self, asks: Sequence[Ask], run: FirstLayers) -> dict[int, float]:
        """a_l by exit, the mean over the sequences, each of which remembers its own."""
        sums = dict.fromkeys(self.exits(run.layers), 0.0)
        for i, ask in enumerate(asks):
            shadows = run.shadows(i)
            for exit in sums:
                whole = self._all.get(exit, (HOPE * PRIOR, PRIOR))
                own = ask.state.get(str(exit), (whole[0] / whole[1] * PRIOR, PRIOR))
                for ok in shadows.get(exit, ()):
                    own = OWN * own[0] + ok, OWN * own[1] + 1
                    whole = ALL * whole[0] + ok, ALL * whole[1] + 1
                ask.state[str(exit)], self._all[exit] = own, whole
                sums[exit] += own[0] / own[1]
        return {exit: total / len(asks) for exit, total in sums.items()}


def tokens_per_layer(a: float, exit: int, guesses: int, layers: int) -> float:
    """TPL: expected tokens of a step over the layers that it computes."""
    return sum(a**i for i in range(guesses + 1)) / (guesses * exit + layers)


def best(hopes: Mapping[int, float], most: int, layers: int) -> tuple[int, int]:
    """(exit, guesses) with the most tokens for a layer; of equals the shorter."""
    found = [(-tokens_per_layer(a, exit, d, layers), d, exit) for exit, a in hopes.items() for d in range(most + 1)]
    _, guesses, exit = min(found)
    return exit, guesses
