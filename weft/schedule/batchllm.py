"""BatchLLM: requests that share a beginning run as a group, and groups with long answers for short prompts go first.

Paper    Zheng et al., BatchLLM, arXiv:2412.03594                                                  (000-9)
Rule     a request belongs to the group of its first `prefix` tokens; the group that is open goes on until nobody of it waits;
         then the group of the largest (answers' tokens / prompts' tokens) of those that wait
Units    prefix: tokens
Cost     O(waiting) in each step
Pays     offline, where many prompts begin alike and the cache does not hold all beginnings at once
Differs  the beginning that is shared has a fixed length, where the paper finds the best ones by dynamic programming over a tree
         of all prompts; answers' lengths are max_tokens; online, a group that goes on and on keeps others waiting
Raises   ValueError if prefix < 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.schedule._common import latest
from weft.slots import Claim, Quota, RequestView, StepView
from weft.traits import Effect, Traits


@register("schedule", "batchllm")
@dataclass(slots=True, kw_only=True)
class BatchLLM:
    """Group by group, so that each beginning is computed once and let go of when its group has ended."""

    prefix: int = 256
    acts: dict[str, int] = field(default_factory=lambda: {"groups_opened": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits(effects=frozenset({Effect.PREEMPTS}))
    static: ClassVar[bool] = False
    steady: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    trial: ClassVar[dict[str, int]] = {"prefix": 32}
    claim: ClassVar[Claim] = Claim(
        "1.1 to 2 times the throughput where beginnings are shared", "output_tok_s", 1.1, "more", case="cache",
    )  # fmt: skip
    _open: bytes = field(default=b"", init=False, compare=False)
    _ratios: dict[bytes, tuple[int, int]] = field(default_factory=dict, init=False, compare=False)
    """(answers' tokens, prompts' tokens) of each group, of those that waited in the step `_at`."""
    _before: dict[bytes, float] = field(default_factory=dict, init=False, compare=False)
    _at: float = field(default=-1.0, init=False, compare=False)

    def __post_init__(self) -> None:
        if self.prefix < 1:
            raise ValueError(f"prefix must be at least 1, got {self.prefix}")

    def order(self, request: RequestView, now: float) -> tuple[float, ...]:
        if request.rank < 2:
            return (request.rank, request.priority, 0, 0.0, request.arrival)
        if now != self._at:
            self._before = {g: -out / prompt for g, (out, prompt) in self._ratios.items()}
            self._at, self._ratios = now, {}
        group = self._group(request)
        out, prompt = self._ratios.get(group, (0, 0))
        self._ratios[group] = out + request.sampling.max_tokens, prompt + request.prompt
        own = -request.sampling.max_tokens / request.prompt
        return (2, request.priority, group != self._open, self._before.get(group, own), request.arrival)

    def _group(self, request: RequestView) -> bytes:
        heads = request.heads(self.prefix)
        return heads[0] if heads else b"%r" % request.arrival

    def admit(self, request: RequestView, step: StepView) -> bool:
        group = self._group(request)
        self.acts["groups_opened"] += group != self._open
        self._open = group
        return True

    def quota(self, request: RequestView, step: StepView) -> Quota:
        return Quota(step.rows_left)

    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None:
        return latest(needy, candidates)
