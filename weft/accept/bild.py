"""BiLD's rollback: a guess stands until the target's law and the small model's word are too far apart.

Paper    Kim et al., Speculative Decoding with Big Little Decoder, arXiv:2302.07863 (004-15)
Rule     p the target's law at a guess x, d = -log p(x), the cross-entropy of what the small model said.  From left to right, the
         first guess with d > rollback is replaced by the target's own token, and those behind it are dropped; where there is
         none, the target's next token follows
Shapes   p: ids and probabilities of the truncated law
Units    rollback: nats
Cost     the law of each row at which a guess was made that the race does not select: O(vocab)
Pays     with a generous rollback where answers are greedy: with 4 guesses of the bundled draft on held-out prose a step gives
         4.51 tokens with rollback=4, 3.36 with 2 and 2.99 with the race, and the 0.5B shape decodes at 1.74 times the race's
         speed with 4 (1.69 with four sequences) and hardly faster with 2 (1.08 and 1.15).  At temperature 0.8 at 1.46 and 1.64
         times with 4, 1.12 and 1.13 with 2; accept=rejection, which keeps the law, comes to 1.29 and 0.84 there
Differs  a guess that the race selects stands at any distance, and guesses share the race's noise: with rollback=0 tokens are
         those of plain decoding.  The paper decodes greedily; here d is taken under the request's own temperature and
         truncation, and at temperature 1 where it is greedy.  Of several guesses for one place that the race does not select the
         first alone may stand.  The paper's other half, when the small model hands over, is draft=bild
Bound    over the prose of `weft conform` with its defaults and draft=bild(guesses=3, fallback=0.2): at temperature 1 the law of
         what stands has a KL divergence of 0.016 nat from the target's on average (0.020 the other way round); greedily what
         stands is 0.039 nat less likely than the target's own.  Beside other drafts 0.0003 nat (prompt_tokens) to 0.37 (jacobi,
         whose guesses are drawn from no law)
Raises   ValueError where rollback is negative
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from weft.accept._common import lenient
from weft.registry import register
from weft.slots import Verify
from weft.traits import Effect, Fidelity, Traits


@register("accept", "bild")
@dataclass(frozen=True, slots=True, kw_only=True)
class BiLD:
    """rollback: how far the target may be from a guess that stands, the paper's alpha_RB."""

    rollback: float = 2.0
    acts: dict[str, int] = field(default_factory=lambda: {"raced": 0, "let": 0, "fell": 0}, init=False, compare=False)
    per_request: ClassVar[bool] = True
    laws: ClassVar[bool] = False
    beside: ClassVar[tuple[str, ...]] = ("draft=bild(guesses=3,fallback=0.2)",)
    other_drafts: ClassVar[float] = 0.4
    traits: ClassVar[Traits] = Traits(fidelity=Fidelity.APPROX, effects=frozenset({Effect.GUESSES}), bound=0.06)

    def __post_init__(self) -> None:
        if not self.rollback >= 0:
            raise ValueError(f"rollback is a distance of 0 or more nats, got {self.rollback}")

    def accept(self, view: Verify) -> tuple[list[int], list[int]]:
        return lenient(view, lambda row, guess: self._stands(view, row, guess), self.acts)

    def _stands(self, view: Verify, row: int, guess: int) -> bool:
        ids, p = view.warm(row)
        return float(p[ids == guess].sum()) >= math.exp(-self.rollback)
