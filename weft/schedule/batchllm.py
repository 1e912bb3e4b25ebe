"""BatchLLM: requests that share a beginning run as a group, and groups with long answers for short prompts go first.

Paper    Zheng et al., BatchLLM, arXiv:2412.03594                                                  (000-9)
Rule     a request belongs to the group of its first `prefix` tokens; the group that is open goes on until nobody of it waits;
         then the group of the largest (answers' tokens / prompts' tokens) of those that wait
Units    prefix: tokens
Cost     O(log waiting) for each request
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
from weft.schedule._common import Least, latest
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
    queues: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    trial: ClassVar[dict[str, int]] = {"prefix": 32}
    claim: ClassVar[Claim] = Claim(
        "1.1 to 2 times the throughput where beginnings are shared", "output_tok_s", 1.1, "more", case="cache",
    )  # fmt: skip
    _open: bytes = field(default=b"", init=False, compare=False)
    _groups: dict[bytes, dict[int, Least[RequestView]]] = field(default_factory=dict, init=False, compare=False)
    """Who waits, by group and priority, in the order of arrival."""
    _sums: dict[bytes, tuple[int, int]] = field(default_factory=dict, init=False, compare=False)
    """(answers' tokens, prompts' tokens) of each group, of those that wait."""
    _all: Least[Least[RequestView]] = field(default_factory=Least, init=False, compare=False)

    def __post_init__(self) -> None:
        if self.prefix < 1:
            raise ValueError(f"prefix must be at least 1, got {self.prefix}")

    def order(self, request: RequestView, now: float) -> tuple[float, ...]:
        if request.rank < 2:
            return (request.rank, request.priority, 0, 0.0, request.arrival)
        group = self._group(request)
        return (2, request.priority, group != self._open, self._ratio(group), request.arrival)

    def put(self, request: RequestView, now: float) -> None:
        group = self._group(request)
        lines = self._groups.setdefault(group, {})
        lines.setdefault(request.priority, Least()).put(request.rid, (request.arrival, request.rid), request)
        out, prompt = self._sums.get(group, (0, 0))
        self._sums[group] = out + request.sampling.max_tokens, prompt + request.prompt
        self._again(group)

    def drop(self, request: RequestView) -> None:
        group = self._group(request)
        lines = self._groups[group]
        lines[request.priority].drop(request.rid)
        if not lines[request.priority]:
            del lines[request.priority]
            self._all.drop((request.priority, group))
        out, prompt = self._sums[group]
        self._sums[group] = out - request.sampling.max_tokens, prompt - request.prompt
        if not lines:
            del self._groups[group], self._sums[group]
        self._again(group)

    def first(self, now: float) -> RequestView | None:
        found = self._all.first()
        if found is None:
            return None
        (priority, *_), line = found
        head = self._groups.get(self._open, {}).get(int(priority), line).first()
        assert head is not None
        return head[1]

    def heads(self, most: int, now: float) -> Sequence[RequestView]:
        """Taken out one after the other and put back, which leaves everything as it was."""
        found: list[RequestView] = []
        before = self._open
        while len(found) < most and (request := self.first(now)) is not None:
            found.append(request)
            self._open = self._group(request)
            self.drop(request)
        for request in found:
            self.put(request, now)
        self._open = before
        return found

    def _again(self, group: bytes) -> None:
        """Find the place of a group of which somebody came or went."""
        for priority, line in self._groups.get(group, {}).items():
            head = line.first()
            assert head is not None
            self._all.put((priority, group), (priority, self._ratio(group), *head[0]), line)

    def _ratio(self, group: bytes) -> float:
        out, prompt = self._sums.get(group, (0, 1))
        return -out / prompt

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
