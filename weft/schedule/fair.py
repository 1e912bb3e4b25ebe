"""Fair: each tenant gets an equal, or weighted, share of service, by a virtual token counter.

Paper    Sheng et al., Fairness in Serving Large Language Models, arXiv:2401.00588
Rule     a tenant's counter grows by (prompt rows * prompt_cost + answer rows * answer_cost) / weight; new ones of the least
         counter first; a tenant that comes back starts at the least counter of those who are there
Units    costs: of a row; weights: by tenant (the salt of its requests), 1 where none is given
Cost     O(1) for each request
Pays     where tenants share a server and one asks for more than the others: its queue is its own
Differs  rows are counted when they are planned; a tenant is forgotten after `most` others have come
Raises   ValueError if a cost or a weight is not above 0 or most < 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.schedule._common import latest
from weft.slots import Claim, Quota, RequestView, StepView
from weft.traits import Effect, Trait, Traits


@register("schedule", "fair")
@dataclass(slots=True, kw_only=True)
class Fair:
    """The virtual token counter."""

    prompt_cost: float = 1.0
    answer_cost: float = 2.0
    weights: dict[str, float] = field(default_factory=dict)
    most: int = 10_000
    _counters: dict[bytes, float] = field(default_factory=dict, init=False, compare=False)
    _here: dict[bytes, float] = field(default_factory=dict, init=False, compare=False)
    acts: dict[str, int] = field(default_factory=lambda: {"rows_counted": 0, "lifted": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits(gives=frozenset({Trait.STARVATION_FREE}), effects=frozenset({Effect.PREEMPTS}))
    static: ClassVar[bool] = False
    steady: ClassVar[bool] = False
    layered: ClassVar[bool] = False
    claim: ClassVar[Claim] = Claim(
        "a tenant that asks for its share is not held up by one that asks for more",
        "light_ttft_s.p99", 0.5, "less", case="tenants",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if (
            not (self.prompt_cost > 0 and self.answer_cost > 0)
            or self.most < 1
            or not all(w > 0 for w in self.weights.values())
        ):
            raise ValueError("costs and weights are above 0, and most is at least 1")

    def order(self, request: RequestView, now: float) -> tuple[float, ...]:
        tenant = request.tenant
        if self._here.get(tenant, -1.0) < now - 1.0 and request.rank == 2:
            self._lift(tenant, now)
        self._here[tenant] = now
        return (request.rank, request.priority, self._counters.get(tenant, 0.0), request.arrival)

    def _lift(self, tenant: bytes, now: float) -> None:
        """A tenant that had nothing to do does not come back with a claim to all the time that it was away."""
        present = [self._counters[t] for t, seen in self._here.items() if seen >= now - 1.0 and t in self._counters]
        least = min(present, default=0.0)
        if self._counters.get(tenant, -1.0) < least:
            self.acts["lifted"] += 1
            self._counters.pop(tenant, None)
            self._counters[tenant] = least
            while len(self._counters) > self.most:
                gone = next(iter(self._counters))
                del self._counters[gone]
                self._here.pop(gone, None)

    def admit(self, request: RequestView, step: StepView) -> bool:
        return True

    def quota(self, request: RequestView, step: StepView) -> Quota:
        rows = min(request.remaining, step.rows_left)
        cost = self.answer_cost if request.decoding else self.prompt_cost
        weight = self.weights.get(request.tenant.decode(errors="replace"), 1.0) if self.weights else 1.0
        self._counters[request.tenant] = self._counters.get(request.tenant, 0.0) + rows * cost / weight
        self.acts["rows_counted"] += rows
        return Quota(step.rows_left)

    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None:
        return latest(needy, candidates)
