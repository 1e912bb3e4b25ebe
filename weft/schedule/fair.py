"""Fair: each tenant gets an equal, or weighted, share of service, by a virtual token counter.

Paper    Sheng et al., Fairness in Serving Large Language Models, arXiv:2401.00588
Rule     a tenant's counter grows by (prompt rows * prompt_cost + answer rows * answer_cost) / weight; new ones of the least
         counter first; a tenant that comes back starts at the least counter of those who are there
Units    costs: of a row; weights: by tenant (the salt of its requests), 1 where none is given
Cost     O(log waiting) for each request
Pays     where tenants share a server and one asks for more than the others: its queue is its own
Differs  rows are counted when they are planned; a tenant is forgotten after `most` others have come
Raises   ValueError if a cost or a weight is not above 0 or most < 1
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.schedule._common import Key, Least, latest
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
    _lines: dict[tuple[int, bytes], Least[RequestView]] = field(default_factory=dict, init=False, compare=False)
    """Who waits, by priority and tenant, in the order of arrival."""
    _all: Least[Least[RequestView]] = field(default_factory=Least, init=False, compare=False)
    _wait: Counter[bytes] = field(default_factory=Counter, init=False, compare=False)
    _left: float = field(default=0.0, init=False, compare=False)
    """The counter of the tenant who waited last, as it was then."""
    acts: dict[str, int] = field(default_factory=lambda: {"rows_counted": 0, "lifted": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits(gives=frozenset({Trait.STARVATION_FREE}), effects=frozenset({Effect.PREEMPTS}))
    static: ClassVar[bool] = False
    queues: ClassVar[bool] = True
    steady: ClassVar[bool] = False
    layered: ClassVar[bool] = False
    claim: ClassVar[Claim] = Claim(
        "a tenant that asks for its share is not held up by one that asks for more",
        "light_ttft_s.p99", 0.5, "less", case="tenants",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not all(x > 0 for x in (self.prompt_cost, self.answer_cost, *self.weights.values())) or self.most < 1:
            raise ValueError("costs and weights are above 0, and most is at least 1")

    def order(self, request: RequestView, now: float) -> tuple[float, ...]:
        return (request.rank, request.priority, self._counters.get(request.tenant, 0.0), request.arrival)

    def put(self, request: RequestView, now: float) -> None:
        who = request.priority, request.tenant
        if self._wait[request.tenant] == 0:
            self._lift(request.tenant)
        self._wait[request.tenant] += 1
        line = self._lines.setdefault(who, Least())
        line.put(request.rid, (request.arrival, request.rid), request)
        self._place(line, self._key(line))

    def drop(self, request: RequestView) -> None:
        who = request.priority, request.tenant
        self._lines[who].drop(request.rid)
        if not self._lines[who]:
            del self._lines[who]
            self._all.drop(who)
        self._wait[request.tenant] -= 1
        if not self._wait[request.tenant]:
            del self._wait[request.tenant]
            self._left = self._counters.get(request.tenant, 0.0)

    def first(self, now: float) -> RequestView | None:
        return next((self._next(line)[1] for line in self._least(1)), None)

    def heads(self, most: int, now: float) -> Sequence[RequestView]:
        """As counters would rise with the prompts of those before; of the first lines alone (a tenant may have several)."""
        found, counters = list[RequestView](), dict[bytes, float]()
        lines = [[r for _, r in line.heads(most)][::-1] for line in self._least(2 * most)]

        def key(i: int) -> tuple[int, float, float, int, int]:
            r = lines[i][-1]
            return r.priority, counters.setdefault(r.tenant, self._counters.get(r.tenant, 0.0)), r.arrival, r.rid, i

        queue = sorted(map(key, range(len(lines))))
        while queue and len(found) < most:
            i = queue[0][-1]
            if queue[0] == key(i):
                found.append(lines[i].pop())
                counters[found[-1].tenant] += self._cost(found[-1], found[-1].remaining)
            heapq.heappop(queue)
            if lines[i]:
                heapq.heappush(queue, key(i))
        return found

    def _least(self, most: int) -> list[Least[RequestView]]:
        """Counters only rise while a tenant waits, so that one whose turn may be over is seen when it is in front."""
        return self._all.settled(most, self._key, self._place)

    def _place(self, line: Least[RequestView], key: Key) -> None:
        _, request = self._next(line)
        self._all.put((request.priority, request.tenant), key, line)

    def _key(self, line: Least[RequestView]) -> Key:
        """Of those who wait in a line."""
        age, request = self._next(line)
        return (request.priority, self._counters.get(request.tenant, 0.0), *age)

    @staticmethod
    def _next(line: Least[RequestView]) -> tuple[Key, RequestView]:
        found = line.first()
        assert found is not None, "a line goes with the last who waits in it"
        return found

    def _lift(self, tenant: bytes) -> None:
        """A tenant that had nothing to ask does not come back with a claim to all the time that it was away."""
        found = self._all.first()
        least = self._left if found is None else found[0][1]
        if self._counters.get(tenant, -1.0) < least:
            self.acts["lifted"] += 1
            self._counters.pop(tenant, None)
            self._counters[tenant] = least
            while len(self._counters) > self.most:
                del self._counters[next(iter(self._counters))]

    def admit(self, request: RequestView, step: StepView) -> bool:
        return True

    def quota(self, request: RequestView, step: StepView) -> Quota:
        rows = min(request.remaining, step.rows_left)
        self._counters[request.tenant] = self._counters.get(request.tenant, 0.0) + self._cost(request, rows)
        self.acts["rows_counted"] += rows
        return Quota(step.rows_left)

    def _cost(self, request: RequestView, rows: int) -> float:
        cost = self.answer_cost if request.decoding else self.prompt_cost
        weight = self.weights.get(request.tenant.decode(errors="replace"), 1.0) if self.weights else 1.0
        return rows * cost / weight

    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None:
        return latest(needy, candidates)
