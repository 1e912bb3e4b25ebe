"""Dynamic SplitFuse: every step has the same number of rows, filled up with pieces of prompts.

Paper    Holmes et al., DeepSpeed-FastGen, arXiv:2401.08671                                          (003-8)
Rule     a row for each decode; prompts by arrival fill the step to `budget` exactly; a prompt that would leave a rest of less
         than `least` rows is cut so that the rest is `least`
Units    budget, least: rows
Cost     O(1) for each request
Pays     where steps of one size matter: their times hardly vary
Differs  the budget is an argument, not found on the device's curve
Raises   ValueError if least < 1 or budget < 2 * least
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.schedule._common import latest
from weft.slots import Claim, Quota, RequestView, StepView
from weft.traits import Effect, Trait, Traits


@register("schedule", "splitfuse")
@dataclass(slots=True, kw_only=True)
class SplitFuse:
    """Long prompts are split, short ones fused."""

    budget: int = 512
    least: int = 32
    acts: dict[str, int] = field(default_factory=lambda: {"split": 0, "evened": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits(gives=frozenset({Trait.STARVATION_FREE}), effects=frozenset({Effect.PREEMPTS}))
    static: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    claim: ClassVar[Claim] = Claim(
        "up to 2.3 times the effective throughput of prompts first",
        "goodput", 2.3, "more", against="prefill_first",
    )  # fmt: skip
    trial: ClassVar[dict[str, float]] = {"budget": 48, "least": 16}

    def __post_init__(self) -> None:
        if self.least < 1 or self.budget < 2 * self.least:
            raise ValueError(
                f"least is at least 1 and budget at least twice as much, got {self.least} and {self.budget}"
            )

    def order(self, request: RequestView, now: float) -> tuple[float, ...]:
        return (request.rank > 0, request.priority, request.arrival)

    def admit(self, request: RequestView, step: StepView) -> bool:
        return step.prompt_rows + step.decode_rows < self.budget

    def quota(self, request: RequestView, step: StepView) -> Quota:
        if request.decoding:
            return Quota(step.rows_left)
        room = min(step.rows_left, self.budget - step.prompt_rows - step.decode_rows)
        if room <= 0:
            return Quota(0 if step.prompt_rows + step.decode_rows else 1)
        rest = request.remaining - room
        if rest <= 0:
            return Quota(room)
        self.acts["split"] += 1
        if rest < self.least < request.remaining:
            self.acts["evened"] += 1
            return Quota(max(1, request.remaining - self.least))
        return Quota(room)

    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None:
        return latest(needy, candidates)
