"""SARATHI: each step has one prompt chunk, and all decodes ride along.

Paper    Agrawal et al., SARATHI, arXiv:2308.16369                                                   (000-5)
Rule     decodes first; then one chunk of one prompt, so long that chunk + decodes is a multiple of `tile`, at most `chunk`
Units    chunk, tile: rows
Cost     O(1) for each request
Pays     where decodes are bound by reading weights, which the chunk reads anyway
Differs  a prompt's last chunk is as short as what is left of it
Raises   ValueError if tile < 1 or chunk < tile
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.schedule._common import latest
from weft.slots import Claim, Quota, RequestView, StepView
from weft.traits import Effect, Trait, Traits


@register("schedule", "sarathi")
@dataclass(slots=True, kw_only=True)
class Sarathi:
    """Decode-maximal batches."""

    chunk: int = 256
    tile: int = 64
    acts: dict[str, int] = field(default_factory=lambda: {"chunks": 0, "prompts_held": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits(gives=frozenset({Trait.STARVATION_FREE}), effects=frozenset({Effect.PREEMPTS}))
    static: ClassVar[bool] = True
    steady: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    claim: ClassVar[Claim] = Claim(
        "1.25 times the throughput of whole prompts, end to end",
        "output_tok_s", 1.25, "more", against="orca",
    )  # fmt: skip
    trial: ClassVar[dict[str, float]] = {"chunk": 32, "tile": 16}

    def __post_init__(self) -> None:
        if self.tile < 1 or self.chunk < self.tile:
            raise ValueError(f"tile is at least 1 and chunk at least tile, got {self.tile} and {self.chunk}")

    def order(self, request: RequestView, now: float) -> tuple[float, ...]:
        return (request.rank, request.priority, request.arrival)

    def admit(self, request: RequestView, step: StepView) -> bool:
        self.acts["prompts_held"] += step.prompt_rows > 0
        return not step.prompt_rows

    def quota(self, request: RequestView, step: StepView) -> Quota:
        if request.decoding:
            return Quota(step.rows_left)
        if step.prompt_rows:
            self.acts["prompts_held"] += 1
            return Quota(0)
        self.acts["chunks"] += 1
        return Quota(max(1, self.chunk - (self.chunk + step.decode_rows) % self.tile))

    def victim(self, needy: RequestView, candidates: Sequence[RequestView]) -> RequestView | None:
        return latest(needy, candidates)
