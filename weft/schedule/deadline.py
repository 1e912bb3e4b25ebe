"""Deadline: who has the least time left until the first token is due goes first; who can't be in time any more is refused.

Paper    none; least slack first (Mok, MIT, 1983), and who is sure to be late is turned away
Rule     due = arrival + ttft_s; slack = due - prompt * row_s - now; new ones with slack by slack, then those without by arrival;
         refuse: who waits and has a deadline is refused once now + what its first token takes at least > due
Units    ttft_s, row_s: seconds; row_s is what a row of a prompt takes, for the order alone
Cost     O(log waiting) for each request
Pays     under overload, where requests that are late anyway would make others late too
Differs  a request may bring its own ttft_s (weft.ttft_s); what it takes at least is measured, not row_s (weft/core/lateness.py);
         whoever has no deadline (batches, background responses, LLM.generate), or has begun, is not refused but served last
Raises   ValueError if ttft_s or row_s is not above 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.schedule._common import Least, latest
from weft.slots import Claim, Quota, RequestView, StepView
from weft.traits import Effect, Traits


@register("schedule", "deadline")
@dataclass(slots=True, kw_only=True)
class Deadline:
    """Time goes to those whom it can still help."""

    ttft_s: float = 1.0
    row_s: float = 5e-5
    refuse: bool = True
    acts: dict[str, int] = field(default_factory=lambda: {"ordered": 0, "overdue": 0}, init=False, compare=False)
    _line: Least[RequestView] = field(default_factory=Least, init=False, compare=False)
    traits: ClassVar[Traits] = Traits(effects=frozenset({Effect.PREEMPTS}))
    static: ClassVar[bool] = False
    queues: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    claim: ClassVar[Claim] = Claim(
        "more requests keep their limit under overload than first come, first served",
        "slo_met", 1.05, "more", case="jam",
    )  # fmt: skip
    trial: ClassVar[dict[str, float]] = {"ttft_s": 0.01, "row_s": 1e-5}

    def __post_init__(self) -> None:
        if not (self.ttft_s > 0 and self.row_s > 0):
            raise ValueError(f"ttft_s and row_s are above 0, got {self.ttft_s} and {self.row_s}")

    @property
    def refuses(self) -> bool:
        return self.refuse

    def due(self, request: RequestView) -> float:
        """When its first token is wanted."""
        return request.arrival + (request.ttft_s or self.ttft_s)

    def order(self, request: RequestView, now: float) -> tuple[float, ...]:
        if request.rank < 2 or request.output:
            return (request.rank, 0, request.priority, request.arrival)
        begin = self.due(request) - request.prompt * self.row_s
        self.acts["ordered"] += 1
        self.acts["overdue"] += begin < now
        return (2, begin < now, request.priority, request.arrival if begin < now else begin)

    def put(self, request: RequestView, now: float) -> None:
        self._line.put(request.rid, (*self.order(request, now), request.rid), request)

    def drop(self, request: RequestView) -> None:
        self._line.drop(request.rid)

    def first(self, now: float) -> RequestView | None:
        return next(iter(self.heads(1, now)), None)

    def heads(self, most: int, now: float) -> Sequence[RequestView]:
        """Once its slack is gone a request goes behind others, and never before them again: it is seen when it is in front."""
        return self._line.settled(
            most, lambda r: (*self.order(r, now), r.rid), lambda r, key: self._line.put(r.rid, key, r)
        )

    def admit(self, request: RequestView, step: StepView) -> bool:
        return True

    def quota(self, request: RequestView, step: StepView) -> Quota:
        return Quota(step.rows_left)

    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None:
        return latest(needy, candidates)
