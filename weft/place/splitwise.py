"""Splitwise: pools for prompts and for answers, and a mixed pool that takes what the first cannot.

Paper    Patel et al., Splitwise, arXiv:2311.18677                                                 (003-7)
Rule     a prompt goes to the prompt machine with the fewest pending rows; where those exceed `queue`, to the mixed machine with
         the least to do, which keeps it; KV goes layer by layer while later layers compute, so that the last layer's shows
Units    prefill, mixed: replicas; queue: rows; layers: of the model, whose last one's transfer is not hidden
Cost     as DistServe, but most of the transfer is hidden
Pays     where load shifts between the phases: the mixed pool takes the peaks
Differs  machines stay in their pool; the paper moves them between pools as load shifts
Raises   ValueError for a pool below its least size, or layers or queue below 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.errors import ConfigError
from weft.place._common import idlest
from weft.registry import register
from weft.slots import Claim
from weft.slots.place import Handed, Role
from weft.slots.route import ReplicaView
from weft.traits import Traits


@register("place", "splitwise")
@dataclass(slots=True, kw_only=True)
class Splitwise:
    """Phases apart, with a way out."""

    prefill: int = 1
    mixed: int = 1
    queue: int = 4096
    layers: int = 32
    acts: dict[str, int] = field(default_factory=lambda: {"handed_over": 0, "mixed": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits()
    flips: ClassVar[bool] = False
    claim: ClassVar[Claim] = Claim(
        "1.4 times the throughput of mixed batches at equal limits", "goodput", 1.4, "more", against="least_loaded",
        case="disaggregated",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.prefill < 1 or self.mixed < 0 or self.queue < 1 or self.layers < 1:
            raise ValueError("prefill, queue and layers are at least 1, and mixed not below 0")

    @property
    def exposed(self) -> float:
        return 1.0 / self.layers

    def roles(self, replicas: int) -> Sequence[Role]:
        rest = replicas - self.prefill - self.mixed
        if rest < 1:
            raise ConfigError(
                f"{self.prefill} + {self.mixed} replicas leave none of {replicas} for answers; give it more --replicas"
            )
        prompts: list[Role] = ["prefill"] * self.prefill
        both: list[Role] = ["mixed"] * self.mixed
        answers: list[Role] = ["decode"] * rest
        return prompts + both + answers

    def enter(self, prompt: int, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> int:
        best = idlest(replicas, roles, ("prefill",), each=0)
        if self.mixed and replicas[best].pending + prompt > self.queue and replicas[best].pending:
            self.acts["mixed"] += 1
            return idlest(replicas, roles, ("mixed",))
        return best

    def handoff(self, request: Handed, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> int:
        self.acts["handed_over"] += 1
        return idlest(replicas, roles, ("decode",))

    def review(self, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> Sequence[Role]:
        return roles
