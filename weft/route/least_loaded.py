"""Least loaded: the replica with the least work before it.

Paper    none; join the shortest queue, with work in place of length (Splitwise's pending tokens, arXiv:2311.18677)  (003-7)
Rule     the least of (rows of prompts not computed + sequences * each); of equals the first
Units    rows; each: rows that a running or waiting sequence stands for
Cost     O(replicas) a request
Pays     where prompts differ much in length; `weft policies` has the figures
Differs  the rows that answers will take are not known, so a sequence counts for a fixed number
Raises   ValueError if each < 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.slots import Claim, ReplicaView
from weft.traits import Traits


@register("route", "least_loaded")
@dataclass(slots=True, kw_only=True)
class LeastLoaded:
    each: int = 128
    acts: dict[str, int] = field(default_factory=lambda: {"compared": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits()
    looks: ClassVar[bool] = True
    claim: ClassVar[Claim] = Claim(
        "queues of equal length, and so a shorter tail",
        "ttft_s.p99", 1.0, "less", against="round_robin", case="replicas",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.each < 0:
            raise ValueError(f"each is a number of rows, got {self.each}")

    def choose(self, prompt: Sequence[int], tenant: bytes, replicas: Sequence[ReplicaView], now: float) -> int:
        self.acts["compared"] += len(replicas)
        return min(
            range(len(replicas)),
            key=lambda i: (replicas[i].pending + self.each * (replicas[i].running + replicas[i].waiting), i),
        )
