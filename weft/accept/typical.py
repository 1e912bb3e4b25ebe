"""Typical acceptance: a guess stands where the target finds it likely enough for how unsure it is, drawn or not.

Paper    Cai et al., Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, arXiv:2401.10774
Rule     p the target's law at a guess x, H its entropy.  From left to right: x stands if p(x) > min(epsilon, delta exp(-H)); the
         token after the last that stands is the target's own
Shapes   p: ids and probabilities of the truncated law
Units    probabilities, after temperature, truncation, bias and penalties of the request; H: nats
Cost     the law of each row at which a guess was made that the race does not select: O(vocab)
Pays     where answers are sampled and may be likelier than the model's own: with 4 guesses of the bundled draft on held-out
         prose a step gives 3.19 tokens at temperature 0.8 and 3.03 at 1, where it gives 2.10 and 2.09 with the race and 2.26
         and 2.33 with rejection, which keeps the law; the 0.5B shape decodes at 1.18 to 1.64 times the race's speed with one
         sequence, rejection at 1.17 to 1.59, and at 1.12 to 1.29 with four, rejection at 0.80 to 0.95.  Never where answers are
         greedy
Differs  a guess that the race selects stands too, so that nothing stands less often than by accept=race, and guesses share the
         race's noise; the paper's first token, and the one after the last that stands, are the likeliest, here they are drawn.
         Of several guesses for one place that the race does not select the first alone is asked about, where the paper takes
         the longest path of those that pass.  A certain law (temperature 0) lets nothing stand but its token: greedy answers are
         exact, as the paper says
Bound    over the prose of `weft conform` with its defaults and draft=speculative_sampling(guesses=3), temperature 1: the law of
         what stands has a KL divergence of 0.09 nat from the target's on average (0.07 the other way round); greedily none.
         Beside other drafts 0.05 nat (prompt_tokens) to 1.0: with jacobi, whose guesses are drawn from no law, and with a draft
         of 48 tokens (vocabtrim)
Raises   ValueError unless 0 < epsilon <= 1 and delta > 0, or delta is left out
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from weft.accept._common import lenient
from weft.registry import register
from weft.slots import Verify
from weft.traits import Effect, Fidelity, Traits


@register("accept", "typical")
@dataclass(frozen=True, slots=True, kw_only=True)
class Typical:
    """epsilon: a guess likelier than that stands in any event.  delta: how likely beside exp(-H), else the root of epsilon."""

    epsilon: float = 0.09
    delta: float | None = None
    acts: dict[str, int] = field(default_factory=lambda: {"raced": 0, "let": 0, "fell": 0}, init=False, compare=False)
    per_request: ClassVar[bool] = True
    laws: ClassVar[bool] = False
    beside: ClassVar[tuple[str, ...]] = ("draft=speculative_sampling(guesses=3)",)
    other_drafts: ClassVar[float] = 1.0
    traits: ClassVar[Traits] = Traits(fidelity=Fidelity.APPROX, effects=frozenset({Effect.GUESSES}), bound=0.12)

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon is above 0 and at most 1, got {self.epsilon}")
        if self.delta is not None and not self.delta > 0:
            raise ValueError(f"delta is above 0, got {self.delta}; leave it out for the root of epsilon")

    def accept(self, view: Verify) -> tuple[list[int], list[int]]:
        return lenient(view, lambda row, guess: self._stands(view, row, guess), self.acts)

    def _stands(self, view: Verify, row: int, guess: int) -> bool:
        ids, p = view.law(row)
        own = float(p[ids == guess].sum())
        if own > self.epsilon:
            return True
        delta = math.sqrt(self.epsilon) if self.delta is None else self.delta
        return own > min(self.epsilon, delta * math.exp(-entropy(p)))


def entropy(p: Any) -> float:
    """Of a law, in nats."""
    import numpy as np

    p = p[p > 0]
    return -float(p @ np.log(p))
