"""FCFS: first come, first served, in Sarathi's order within a step.

Paper    Agrawal et al., Sarathi-Serve, arXiv:2403.02310            (000-2)
Rule     running decodes, then half-done prompts, then new prompts; within each by priority, then arrival;
         the last chunk is cut to what is left of the row budget
Units    rows: tokens of one step
Cost     O(1) for each request
Differs  the row budget is the engine's (`max_rows`), not found by profiling
Raises   nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from weft.registry import register
from weft.slots import Quota, RequestView, StepView
from weft.traits import Effect, Trait, Traits


@register("schedule", "fcfs")
@dataclass(frozen=True, slots=True)
class FCFS:
    """The null of the slot."""

    traits: ClassVar[Traits] = Traits(gives=frozenset({Trait.STARVATION_FREE}), effects=frozenset({Effect.PREEMPTS}))
    static: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    layered: ClassVar[bool] = False

    def order(self, request: RequestView, now: float) -> tuple[float, ...]:
        return (request.rank, request.priority, request.arrival)

    def admit(self, request: RequestView, step: StepView) -> bool:
        return True

    def quota(self, request: RequestView, step: StepView) -> Quota:
        return Quota(step.rows_left)

    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None:
        """The latest of the lowest priority, which may be `needy` itself."""
        return max([*candidates, needy], key=lambda r: (r.priority, r.arrival))
