"""DistServe: prompts on some devices, answers on others, in the proportion that gives the most goodput.

Paper    Zhong et al., DistServe, arXiv:2401.09670                                                 (000-52)
Rule     `prefill` replicas compute prompts, first come, first served; each request then goes to the decode replica with the least
         to do, its KV over the link between them
Units    prefill: replicas
Cost     the KV of a prompt goes over a link once; every replica holds all weights
Pays     where tokens must come evenly and prompts are long; where they need not, chunks beside decodes use every device better
Differs  how many compute prompts is an argument (`weft sim --proportions distserve` searches it); all replicas are alike, so
         degrees of parallelism are the same in both phases; KV is sent when the prompt is done, not pulled
Raises   ValueError if prefill < 1
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


@register("place", "distserve")
@dataclass(slots=True, kw_only=True)
class DistServe:
    """Neither phase waits for the other."""

    prefill: int = 1
    acts: dict[str, int] = field(default_factory=lambda: {"handed_over": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits()
    flips: ClassVar[bool] = False
    exposed: ClassVar[float] = 1.0
    claim: ClassVar[Claim] = Claim(
        "over 2 times the requests within tight limits", "goodput", 2.0, "more", against="least_loaded", case="disaggregated",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.prefill < 1:
            raise ValueError(f"at least 1 replica computes prompts, got {self.prefill}")

    def roles(self, replicas: int) -> Sequence[Role]:
        if replicas <= self.prefill:
            raise ConfigError(
                f"{self.prefill} replicas for prompts leave none of {replicas} for answers; give it more --replicas"
            )
        prompts: list[Role] = ["prefill"] * self.prefill
        answers: list[Role] = ["decode"] * (replicas - self.prefill)
        return prompts + answers

    def enter(self, prompt: int, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> int:
        return idlest(replicas, roles, ("prefill",))

    def handoff(self, request: Handed, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> int:
        self.acts["handed_over"] += 1
        return idlest(replicas, roles, ("decode",))

    def review(self, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> Sequence[Role]:
        return roles
