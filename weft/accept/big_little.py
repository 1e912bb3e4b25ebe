"""Big Little Decoder's rollback: a guess stands while the target is not too far from it; there the target's own token is taken.

Paper    Kim et al., Speculative Decoding with Big Little Decoder, arXiv:2302.07863 (004-15)
Rule     p the target's law at a guess x: x stands if -log p(x) <= rollback.  At the first that does not, it and all after it are
         dropped, and the target's own token is taken; where all stand, the target's token follows them
Shapes   p: ids and probabilities of the truncated law
Units    rollback: nats
Cost     the law of each row that is reached: O(vocab)
Pays     where answers may be other ones, beside draft=big_little, which hands over where the small model is not sure
Differs  the law is the request's own, after temperature, truncation, bias and penalties, so a greedy request gets the tokens
         of plain decoding, and with rollback=0 only what is certain stands.  The target's token is the race's winner.  Of
         several guesses that follow the same token the first that stands is taken
Raises   ValueError where rollback is negative
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.slots import Verify, candidates
from weft.traits import Effect, Fidelity, Traits


@register("accept", "big_little")
@dataclass(frozen=True, slots=True, kw_only=True)
class BigLittle:
    """Gives up the law for longer runs of the small model's own words."""

    rollback: float = 3.0
    acts: dict[str, int] = field(default_factory=lambda: {"accepted": 0, "rolled_back": 0}, init=False, compare=False)
    per_request: ClassVar[bool] = True
    laws: ClassVar[bool] = False
    beside: ClassVar[tuple[str, ...]] = ("draft=ngram(shortest=1)",)
    traits: ClassVar[Traits] = Traits(fidelity=Fidelity.APPROX, bound=0.1, effects=frozenset({Effect.GUESSES}))

    def __post_init__(self) -> None:
        if not self.rollback >= 0:
            raise ValueError(f"rollback is a distance in nats and not negative, got {self.rollback}")

    def accept(self, view: Verify) -> tuple[list[int], list[int]]:
        tokens, path, at = list[int](), list[int](), -1
        while found := candidates(view.parents, [at]):
            ids, p = view.law(1 + at)
            least = math.exp(-self.rollback)
            near = next((j for j in found if float(p[ids == view.guesses[j]].sum()) >= least), None)
            if near is None:
                self.acts["rolled_back"] += 1
                break
            at = near
            path.append(at)
            tokens.append(view.guesses[at])
        self.acts["accepted"] += len(path)
        return [*tokens, view.winner(1 + at)], path
