"""Prefill first: prompts before decodes, and no decode in a step that computes a prompt.

Paper    none; the order of engines before chunked prefill (Orca, vLLM v0), kept as a contrary baseline
Rule     new prompts, then half-done prompts, then decodes; a step with prompt rows has no decode rows
Units    rows: tokens of one step
Cost     O(1) for each request
Pays     nowhere: decoding goes at 0.91 to 1.10 of the speed of chunks beside it, which is noise, and first tokens come 1.09 to
         1.22 times as late. Steps with tokens are short (0.08 to 0.14 times) because decodes stand still while a prompt is
         computed, which that figure does not count.  It is the contrary baseline
Differs  prompts longer than the row budget are still cut into chunks
Raises   nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.slots import Claim, Quota, RequestView, StepView
from weft.traits import Effect, Traits


@register("schedule", "prefill_first")
@dataclass(frozen=True, slots=True)
class PrefillFirst:
    """Best throughput of prompts, worst stalls of decodes."""

    acts: dict[str, int] = field(default_factory=lambda: {"decodes_held": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits(effects=frozenset({Effect.PREEMPTS}))
    static: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    claim: ClassVar[Claim] = Claim("first tokens come sooner, and others later", "ttft_s.p50", 1.0, "less")

    def order(self, request: RequestView, now: float) -> tuple[float, ...]:
        return (-request.rank, request.priority, request.arrival)

    def admit(self, request: RequestView, step: StepView) -> bool:
        return True

    def quota(self, request: RequestView, step: StepView) -> Quota:
        if request.decoding and step.prompt_rows:
            self.acts["decodes_held"] += 1
            return Quota(0)
        return Quota(step.rows_left)

    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None:
        return max([*candidates, needy], key=lambda r: (r.priority, r.arrival))
