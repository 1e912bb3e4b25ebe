"""Shortest job first: by the predicted length of the answer, with ageing.

Paper    Hu et al., TetriInfer, arXiv:2401.11181                                                    (002-65)
Rule     new ones by rows + predicted answer + ageing * arrival; a prediction falls into the right bucket with chance `accuracy`
Units    ageing: tokens that a second of waiting is worth; bucket: tokens
Cost     O(1) for each request
Pays     where answers differ much in length and there is a queue: the mean falls, those with long answers wait longer
Differs  the prediction is the request's own limit (max_tokens), misread at a rate; the paper trains a model of 125M parameters
Raises   ValueError if ageing < 0, bucket < 1 or accuracy is no share
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.schedule._common import latest
from weft.slots import Claim, Quota, RequestView, StepView
from weft.traits import Effect, Trait, Traits


@register("schedule", "shortest")
@dataclass(slots=True, kw_only=True)
class Shortest:
    """Short answers do not wait behind long ones."""

    ageing: float = 50.0
    bucket: int = 100
    accuracy: float = 0.75
    acts: dict[str, int] = field(default_factory=lambda: {"predicted": 0, "misread": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits(gives=frozenset({Trait.STARVATION_FREE}), effects=frozenset({Effect.PREEMPTS}))
    static: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    claim: ClassVar[Claim] = Claim(
        "47 % lower mean completion time, beside its other parts",
        "e2e_s.mean", 0.53, "less", case="jam",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.ageing < 0 or self.bucket < 1 or not 0 <= self.accuracy <= 1:
            raise ValueError("ageing is not below 0, bucket at least 1, and accuracy a share from 0 to 1")

    def order(self, request: RequestView, now: float) -> tuple[float, ...]:
        if request.rank < 2:
            return (request.rank, request.priority, request.arrival)
        self.acts["predicted"] += 1
        return (2, request.priority, request.prompt + self.predict(request) + self.ageing * request.arrival)

    def predict(self, request: RequestView) -> float:
        """Middle of the bucket that the answer is thought to fall into: the right one, or by chance one of its neighbours."""
        right = request.sampling.max_tokens // self.bucket
        drawn = (hash((request.arrival, request.prompt)) & 0xFFFF) / 0x10000
        if drawn >= self.accuracy:
            self.acts["misread"] += 1
            right = right + 2 if drawn >= (1 + self.accuracy) / 2 else max(0, right - 2)
        return (right + 0.5) * self.bucket

    def admit(self, request: RequestView, step: StepView) -> bool:
        return True

    def quota(self, request: RequestView, step: StepView) -> Quota:
        return Quota(step.rows_left)

    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None:
        return latest(needy, candidates)
