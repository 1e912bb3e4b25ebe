"""Orca: iteration-level batching, first come first served, each prompt in one piece.

Paper    Yu et al., Orca, OSDI 2022; Flover, arXiv:2305.13484                                       (003-17)
Rule     requests by arrival, at most `size` at once; a new one joins at the next step and takes its whole prompt in one
Units    size: sequences
Cost     O(1) for each request
Pays     against static batching, by far; against chunks it lengthens the steps of those who decode
Differs  a prompt longer than what decodes leave of a step is cut; memory is not reserved for the longest answer
Raises   ValueError if size < 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.schedule._common import latest
from weft.slots import Claim, Quota, RequestView, StepView
from weft.traits import Effect, Trait, Traits


@register("schedule", "orca")
@dataclass(slots=True, kw_only=True)
class Orca:
    """Who comes joins at the next token; who ends leaves at once."""

    size: int = 64
    acts: dict[str, int] = field(default_factory=lambda: {"joined": 0, "put_off": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits(gives=frozenset({Trait.STARVATION_FREE}), effects=frozenset({Effect.PREEMPTS}))
    static: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    claim: ClassVar[Claim] = Claim(
        "over 11 times the throughput of static batches under random arrivals",
        "output_tok_s", 11.0, "more", against="static",
    )  # fmt: skip
    trial: ClassVar[dict[str, float]] = {"size": 6}

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")

    def order(self, request: RequestView, now: float) -> tuple[float, ...]:
        return (request.rank == 2, request.priority, request.arrival)

    def admit(self, request: RequestView, step: StepView) -> bool:
        if step.running >= self.size:
            return False
        self.acts["joined"] += 1
        return True

    def quota(self, request: RequestView, step: StepView) -> Quota:
        if request.decoding or request.remaining <= step.rows_left:
            return Quota(step.rows_left)
        if not step.prompt_rows:
            return Quota(step.rows_left)  # longer than a step beside those who decode: it takes all of it
        self.acts["put_off"] += 1
        return Quota(0)

    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None:
        return latest(needy, candidates)
