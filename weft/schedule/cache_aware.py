"""Cache aware: the prompt of which the longest beginning was computed lately goes first, for as long as nobody starves.

Paper    Zheng et al., SGLang, arXiv:2312.07104 (longest shared prefix first)
Rule     new ones by (waits longer than patience_s, tokens of the prompt that were computed lately, arrival); who has waited too
         long goes before all others, by arrival
Units    patience_s: seconds; block: tokens by which beginnings are told apart; most: beginnings that are remembered
Cost     O(log waiting) for each request, and as much again for each block of its prompt that is remembered or forgotten while it
         waits
Pays     where prompts of several conversations or documents come mixed and the cache does not hold all of them
Differs  it remembers what was computed and is not told what was evicted; the paper walks the radix tree of the cache itself
Raises   ValueError if patience_s is not above 0, or block or most below 1
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.schedule._common import Least, latest
from weft.slots import Claim, Quota, RequestView, StepView
from weft.traits import Effect, Trait, Traits


@register("schedule", "cache_aware")
@dataclass(slots=True, kw_only=True)
class CacheAware:
    """Those who share a beginning follow each other while it is there."""

    patience_s: float = 10.0
    block: int = 64
    most: int = 4096
    acts: dict[str, int] = field(default_factory=lambda: {"matched": 0, "remembered": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits(gives=frozenset({Trait.STARVATION_FREE}), effects=frozenset({Effect.PREEMPTS}))
    static: ClassVar[bool] = False
    queues: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    trial: ClassVar[dict[str, float]] = {"block": 16}
    claim: ClassVar[Claim] = Claim(
        "more of the prompts comes from the cache than first come, first served", "cached_tokens", 1.05, "more", case="cache",
    )  # fmt: skip
    _seen: OrderedDict[bytes, None] = field(default_factory=OrderedDict, init=False, compare=False)

    _old: Least[RequestView] = field(default_factory=Least, init=False, compare=False)
    _best: Least[RequestView] = field(default_factory=Least, init=False, compare=False)
    _watched: dict[int, bytes] = field(default_factory=dict, init=False, compare=False)
    _watch: dict[bytes, dict[int, RequestView]] = field(default_factory=dict, init=False, compare=False)
    """Who waits, by the name of the first part of its prompt that is not remembered."""

    def __post_init__(self) -> None:
        if not self.patience_s > 0 or self.block < 1 or self.most < 1:
            raise ValueError("patience_s is above 0, and block and most are at least 1")

    def order(self, request: RequestView, now: float) -> tuple[float, ...]:
        if request.rank < 2:
            return (request.rank, request.priority, 0, 0, request.arrival)
        if now - request.arrival > self.patience_s:
            return (2, request.priority, 0, 0, request.arrival)
        return (2, request.priority, 1, -self._matches(request), request.arrival)

    def put(self, request: RequestView, now: float) -> None:
        self._old.put(request.rid, (request.priority, request.arrival, request.rid), request)
        self._place(request)

    def drop(self, request: RequestView) -> None:
        self._old.drop(request.rid)
        self._best.drop(request.rid)
        self._unwatch(request.rid)

    def first(self, now: float) -> RequestView | None:
        oldest = self._old.first()
        if oldest is not None and now - oldest[1].arrival > self.patience_s:
            return oldest[1]
        return next(iter(self._nearest(1)), None)

    def heads(self, most: int, now: float) -> Sequence[RequestView]:
        """Whoever is among the first is so by its age or by its matches."""
        both = {r.rid: r for r in (*(r for _, r in self._old.heads(most)), *self._nearest(most))}
        return sorted(both.values(), key=lambda r: (self.order(r, now), r.rid))[:most]

    def _nearest(self, most: int) -> list[RequestView]:
        """What was forgotten is seen when it would put a request in front; what was remembered has moved it already."""
        return self._best.settled(most, lambda r: self._key(r, self._matches(r)), lambda r, _: self._place(r))

    def _key(self, request: RequestView, matches: int) -> tuple[float, ...]:
        return (request.priority, -matches, request.arrival, request.rid)

    def _place(self, request: RequestView) -> None:
        """Where its matches put it; it is moved when what comes next in its prompt is remembered."""
        n, names = self._matches(request), request.heads(self.block)
        self._best.put(request.rid, self._key(request, n), request)
        self._unwatch(request.rid)
        if n < len(names):
            self._watched[request.rid] = names[n]
            self._watch.setdefault(names[n], {})[request.rid] = request

    def _unwatch(self, rid: int) -> None:
        name = self._watched.pop(rid, None)
        if name is not None:
            del self._watch[name][rid]
            if not self._watch[name]:
                del self._watch[name]

    def _matches(self, request: RequestView) -> int:
        """Blocks of the prompt's beginning that were computed lately."""
        n = 0
        for name in request.heads(self.block):
            if name not in self._seen:
                break
            n += 1
        return n

    def admit(self, request: RequestView, step: StepView) -> bool:
        names = request.heads(self.block)
        self.acts["matched"] += bool(names) and names[0] in self._seen
        new = [name for name in names if name not in self._seen]
        self.acts["remembered"] += len(new)
        for name in names:
            self._seen[name] = None
            self._seen.move_to_end(name)
        while len(self._seen) > self.most:
            self._seen.popitem(last=False)
        for name in new:
            for other in list(self._watch.get(name, {}).values()):
                self._place(other)
        return True

    def quota(self, request: RequestView, step: StepView) -> Quota:
        return Quota(step.rows_left)

    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None:
        return latest(needy, candidates)
