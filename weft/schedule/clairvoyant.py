"""Clairvoyant: the shortest remaining work first, known beforehand.  A bound, not a policy.

Paper    Schrage, A Proof of the Optimality of the Shortest Remaining Processing Time Discipline, Operations Research 16(3), 1968
Rule     everybody by the rows and tokens that are still to come; who has least goes first
Units    rows
Cost     O(1) for each request
Pays     nowhere: answers' lengths are not known; it is what mean latency could be at best on one server
Differs  optimal for one server and one job at a time; a batch is not that, so it is a scale and no proof
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


@register("schedule", "clairvoyant")
@dataclass(slots=True, kw_only=True)
class Clairvoyant:
    """It reads how long answers will be, which a simulation knows where max_tokens is the true length."""

    acts: dict[str, int] = field(default_factory=lambda: {"ordered": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits(effects=frozenset({Effect.PREEMPTS}))
    static: ClassVar[bool] = True
    steady: ClassVar[bool] = False
    layered: ClassVar[bool] = False
    claim: ClassVar[Claim] = Claim(
        "the least mean time to the end",
        "e2e_s.mean", 1.0, "less", case="jam",
    )  # fmt: skip

    def order(self, request: RequestView, now: float) -> tuple[float, ...]:
        self.acts["ordered"] += 1
        return (request.remaining + request.sampling.max_tokens - len(request.output), request.arrival)

    def admit(self, request: RequestView, step: StepView) -> bool:
        return True

    def quota(self, request: RequestView, step: StepView) -> Quota:
        return Quota(step.rows_left)

    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None:
        return latest(needy, candidates)
