"""Typical acceptance: a guess stands where the target finds it likely enough, the more freely the less sure the target is.

Paper    Cai et al., Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, arXiv:2401.10774; Hewitt et
         al., Truncation Sampling as Language Model Desmoothing, arXiv:2210.15191, whose threshold it is
Rule     p the target's law at a guess x, H its entropy in nats: x stands if p(x) > min(epsilon, delta exp(-H)).  Of a tree the
         longest line whose guesses all stand, and of equally long ones the likeliest; after it the race's winner
Shapes   p: ids and probabilities of the truncated law
Units    epsilon: a probability; delta: a share of exp(-H)
Cost     the law of each row that is reached: O(vocab)
Pays     where answers may be other ones: more guesses stand than any rule may let stand that keeps the law
Differs  the law is the request's own, after temperature, truncation, bias and penalties, so a greedy request gets the tokens
         of plain decoding.  Guesses of a second model are drawn by the noise of the race, and what falls is the race's
Raises   ValueError unless 0 < epsilon <= 1 and delta > 0
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from weft.registry import register
from weft.slots import Verify, candidates, line
from weft.traits import Effect, Fidelity, Traits


@register("accept", "typical")
@dataclass(frozen=True, slots=True, kw_only=True)
class Typical:
    """Gives up the law: guesses of a draft that agrees roughly stand although the target would have said something else."""

    epsilon: float = 0.09
    delta: float = 0.3
    acts: dict[str, int] = field(default_factory=lambda: {"accepted": 0, "rejected": 0}, init=False, compare=False)
    per_request: ClassVar[bool] = True
    laws: ClassVar[bool] = False
    beside: ClassVar[tuple[str, ...]] = ("draft=ngram(shortest=1)",)
    traits: ClassVar[Traits] = Traits(fidelity=Fidelity.APPROX, bound=0.1, effects=frozenset({Effect.GUESSES}))

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1 or not self.delta > 0:
            raise ValueError(f"0 < epsilon <= 1 and delta > 0 are needed, got {self.epsilon} and {self.delta}")

    def accept(self, view: Verify) -> tuple[list[int], list[int]]:
        best, open_ = (0, 0.0, -1), [(0, 0.0, -1)]
        while open_:
            depth, score, at = open_.pop()
            best = max(best, (depth, score, at), key=lambda one: one[:2])
            found = candidates(view.parents, [at])
            if not found:
                continue
            ids, p = view.law(1 + at)
            least = self.threshold(p)
            for j in reversed(found):
                own = float(p[ids == view.guesses[j]].sum())
                if own > least:
                    open_.append((depth + 1, score + math.log(own), j))
        path = line(view.parents, best[2])
        self.acts["accepted"] += len(path)
        self.acts["rejected"] += bool(candidates(view.parents, [best[2]]))
        return [*(view.guesses[j] for j in path), view.winner(1 + best[2])], path

    def threshold(self, p: Any) -> float:
        """Above which a guess stands.  p: probabilities, without zeros or with them."""
        some = p[p > 0]
        entropy = -float((some * [math.log(x) for x in some.tolist()]).sum())
        return min(self.epsilon, self.delta * math.exp(-entropy))
