"""Priority: strictly by priority, prompts and decodes alike.

Paper    none; preemptive priority as operating systems have it
Rule     by (priority, rank, arrival): an urgent prompt goes before decodes of lower priority, which yield rows and blocks to it
Units    rows: tokens of one step
Cost     O(1) for each request
Pays     where some requests are urgent and may cost the others; without urgent ones it is FCFS
Differs  nothing
Raises   nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.schedule._common import latest
from weft.slots import Claim, Quota, RequestView, StepView
from weft.traits import Effect, Traits


@register("schedule", "priority")
@dataclass(slots=True, kw_only=True)
class Priority:
    """The urgent ones first, in everything."""

    acts: dict[str, int] = field(default_factory=lambda: {"urgent_first": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits(effects=frozenset({Effect.PREEMPTS}))
    static: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    claim: ClassVar[Claim] = Claim(
        "urgent requests keep their latency under any load of others",
        "urgent_ttft_s.p99", 0.5, "less", case="urgent",
    )  # fmt: skip

    def order(self, request: RequestView, now: float) -> tuple[float, ...]:
        return (request.priority, request.rank, request.arrival)

    def admit(self, request: RequestView, step: StepView) -> bool:
        return True

    def quota(self, request: RequestView, step: StepView) -> Quota:
        self.acts["urgent_first"] += not request.decoding and step.decode_rows == 0
        return Quota(step.rows_left)

    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None:
        return latest(needy, candidates)
