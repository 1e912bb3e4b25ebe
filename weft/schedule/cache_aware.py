"""Cache aware: the prompt of which the longest beginning was computed lately goes first, for as long as nobody starves.

Paper    Zheng et al., SGLang, arXiv:2312.07104 (longest shared prefix first)
Rule     new ones by (waits longer than patience_s, tokens of the prompt that were computed lately, arrival); who has waited too
         long goes before all others, by arrival
Units    patience_s: seconds; block: tokens by which beginnings are told apart; most: beginnings that are remembered
Cost     a look-up for each block that matches, for each request that waits, in each step
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
from weft.schedule._common import latest
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
    steady: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    trial: ClassVar[dict[str, float]] = {"block": 16}
    claim: ClassVar[Claim] = Claim(
        "more of the prompts comes from the cache than first come, first served", "cached_tokens", 1.05, "more", case="cache",
    )  # fmt: skip
    _seen: OrderedDict[bytes, None] = field(default_factory=OrderedDict, init=False, compare=False)

    def __post_init__(self) -> None:
        if not self.patience_s > 0 or self.block < 1 or self.most < 1:
            raise ValueError("patience_s is above 0, and block and most are at least 1")

    def order(self, request: RequestView, now: float) -> tuple[float, ...]:
        if request.rank < 2:
            return (request.rank, request.priority, 0, 0, request.arrival)
        if now - request.arrival > self.patience_s:
            return (2, request.priority, 0, 0, request.arrival)
        return (2, request.priority, 1, -self._matches(request), request.arrival)

    def _matches(self, request: RequestView) -> int:
        """Blocks of the prompt's beginning that were computed lately."""
        n = 0
        for name in request.heads(self.block):
            if name not in self._seen:
                break
            n += 1
        self.acts["matched"] += n > 0
        return n

    def admit(self, request: RequestView, step: StepView) -> bool:
        for name in request.heads(self.block):
            self.acts["remembered"] += name not in self._seen
            self._seen[name] = None
            self._seen.move_to_end(name)
        while len(self._seen) > self.most:
            self._seen.popitem(last=False)
        return True

    def quota(self, request: RequestView, step: StepView) -> Quota:
        return Quota(step.rows_left)

    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None:
        return latest(needy, candidates)
