"""Context-aware decoding: what a document makes likelier counts more than what the model knew anyway.

Paper    Shi et al., arXiv:2305.14739; reproduced by Xu, arXiv:2312.14335 [004-103]; the mask is Li et al.'s, arXiv:2210.15097
Rule     logits = (1 + alpha) * l_with - alpha * l_without; with beta > 0, tokens whose probability with the context is below beta
         times the largest are left out.  l_without: of a companion context that lacks the document and sees the same output
Shapes   [2, vocab] float32 to [vocab] float32
Units    logits; alpha, beta: factors
Cost     two rows for each token, planned in one step, and the KV of both contexts
Pays     nowhere on these models: it is slower, as each token takes two rows (0.87 to 0.99 of the speed), and right answers
         about a text are as many on the bundled model and fall from 94 to 88 % on the 135M shape.  It is meant for models that
         have learned by heart what a text contradicts, which models this small have not; that case was not reproduced
Differs  nothing.  Fidelity is meant against the rule.  Temperature, truncation, bias and penalties act on the combined logits,
         and log-probabilities are reported of them: of the law that was drawn from
Raises   ValueError for alpha that is negative or no finite number, or beta outside [0, 1]
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from weft.registry import register
from weft.traits import Effect, Traits


@register("sample", "cad")
@dataclass(frozen=True, slots=True, kw_only=True)
class CAD:
    """alpha: 0 is plain decoding, 0.5 the paper's; larger ones override more of what the model believes."""

    alpha: float = 0.5
    beta: float = 0.0
    acts: dict[str, int] = field(default_factory=lambda: {"rows_contrasted": 0}, init=False, compare=False)
    companions: ClassVar[int] = 1
    neutral: ClassVar[dict[str, object]] = {"alpha": 0.0}
    per_request: ClassVar[bool] = True
    traits: ClassVar[Traits] = Traits(effects=frozenset({Effect.REDEFINES, Effect.ONE_AT_A_TIME}))

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0 and 0 <= self.beta <= 1):
            raise ValueError(f"alpha >= 0 and 0 <= beta <= 1 are needed, got alpha={self.alpha}, beta={self.beta}")

    def warp(self, logits: Any) -> Any:
        own, without = logits
        combined = (1 + self.alpha) * own - self.alpha * without
        if self.beta > 0:
            combined = combined.masked_fill(own < own.max() + math.log(self.beta), -math.inf)
        self.acts["rows_contrasted"] += self.alpha > 0  # with 0 the other context has no say
        return combined
