"""Sarathi-Serve: stall-free batches under a row budget that the time between tokens allows.

Paper    Agrawal et al., Sarathi-Serve, arXiv:2403.02310                                             (000-2)
Rule     budget = (tbt_s - step_s) / row_s, rounded down to a tile; decodes, then half-done prompts, then new ones, up to it
Units    tbt_s: seconds between tokens; step_s, row_s: of a step and of each row beyond those that come for nothing; tile: rows
Cost     O(1) for each request
Pays     where a limit between tokens is to be kept: long prompts no longer stall those who decode
Differs  step_s and row_s are arguments (weft calibrate tells them), not profiled by the policy
Raises   ValueError if the times leave no budget of at least one tile
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.schedule._common import latest
from weft.slots import Claim, Quota, RequestView, StepView
from weft.traits import Effect, Trait, Traits


@register("schedule", "sarathi_serve")
@dataclass(slots=True, kw_only=True)
class SarathiServe:
    """The budget follows from the limit."""

    tbt_s: float = 0.05
    step_s: float = 0.01
    row_s: float = 8e-5
    tile: int = 128
    acts: dict[str, int] = field(default_factory=lambda: {"prompts_cut": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits(gives=frozenset({Trait.STARVATION_FREE}), effects=frozenset({Effect.PREEMPTS}))
    static: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    claim: ClassVar[Claim] = Claim(
        "at least 2.6 times the requests of prompts first with the tail of gaps between tokens within a limit",
        "capacity", 2.6, "more", against="prefill_first", case="gaps",
    )  # fmt: skip
    trial: ClassVar[dict[str, float]] = {"tbt_s": 0.05, "step_s": 0.01, "row_s": 1e-3, "tile": 8}

    def __post_init__(self) -> None:
        if self.tile < 1 or not (self.step_s >= 0 and self.row_s > 0) or self.budget < self.tile:
            raise ValueError(
                f"tbt_s={self.tbt_s} leaves no tile of {self.tile} rows beside step_s={self.step_s} at row_s={self.row_s}; "
                "give it more time or smaller tiles"
            )

    @property
    def budget(self) -> int:
        """Rows of a step that keep the limit."""
        return int((self.tbt_s - self.step_s) / self.row_s) // self.tile * self.tile

    def order(self, request: RequestView, now: float) -> tuple[float, ...]:
        return (request.rank, request.priority, request.arrival)

    def admit(self, request: RequestView, step: StepView) -> bool:
        return step.prompt_rows + step.decode_rows < self.budget

    def quota(self, request: RequestView, step: StepView) -> Quota:
        if request.decoding:
            return Quota(step.rows_left)
        room = max(0, self.budget - step.prompt_rows - step.decode_rows)
        self.acts["prompts_cut"] += room < min(request.remaining, step.rows_left)
        return Quota(min(step.rows_left, max(room, 0 if step.prompt_rows + step.decode_rows else 1)))

    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None:
        return latest(needy, candidates)
