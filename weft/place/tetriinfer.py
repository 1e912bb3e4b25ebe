"""TetriInfer: prompts and answers on instances of their own, which change sides as the load does.

Paper    Hu et al., Inference without Interference, arXiv:2401.11181                               (002-65)
Rule     a prompt goes to the prefill instance with the fewest pending rows; its answer to the one of two decode instances,
         drawn by chance, with less of its memory in use; where the rows before each prefill instance exceed `rows`, the decode
         instance with the fewest sequences changes sides, and where they fall below an eighth of that and sequences exceed
         `seqs` for each decode instance, the prefill instance with the fewest rows does
Units    prefill: instances at first; rows: of prompts; seqs: sequences; pause_s: seconds between two changes
Cost     O(instances) a request; an instance that changes sides ends what it has in hand beside its new work
Pays     where the proportion of prompts to answers changes; where it does not, the best fixed proportion is as good
Differs  lengths of answers are not predicted, so memory in use stands for predicted memory; chunks are those of the schedule
         (`splitfuse(budget=512)` has the paper's); an instance changes sides by what waits, not by a minute of idleness
Raises   ValueError for prefill, rows or seqs below 1 or pause_s < 0
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.errors import ConfigError
from weft.place._common import idlest
from weft.registry import register
from weft.slots import Claim
from weft.slots.place import Role
from weft.slots.route import ReplicaView
from weft.traits import Traits


@register("place", "tetriinfer")
@dataclass(slots=True, kw_only=True)
class TetriInfer:
    """Roles that follow the load."""

    prefill: int = 1
    rows: int = 6000
    seqs: int = 64
    pause_s: float = 2.0
    _changed: float = field(default=-1e9, init=False, compare=False)
    acts: dict[str, int] = field(default_factory=lambda: {"handed_over": 0, "flipped": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits()
    exposed: ClassVar[float] = 1.0
    flips: ClassVar[bool] = True
    claim: ClassVar[Claim] = Claim(
        "mean job completion 47 % shorter than of mixed batches, on loads that mix light and heavy phases", "e2e_s.mean", 0.53,
        "less", against="least_loaded", case="shifting",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if min(self.prefill, self.rows, self.seqs) < 1 or self.pause_s < 0:
            raise ValueError("prefill, rows and seqs are at least 1, and pause_s not below 0")

    def roles(self, replicas: int) -> Sequence[Role]:
        if replicas <= self.prefill:
            raise ConfigError(
                f"{self.prefill} of {replicas} replicas for prompts leave none for answers; add --replicas"
            )
        prompts: list[Role] = ["prefill"] * self.prefill
        answers: list[Role] = ["decode"] * (replicas - self.prefill)
        return prompts + answers

    def enter(self, prompt: int, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> int:
        return idlest(replicas, roles, ("prefill",), each=0)

    def handoff(self, prompt: int, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> int:
        self.acts["handed_over"] += 1
        pool = [i for i, role in enumerate(roles) if role == "decode"]
        drawn = hashlib.blake2b(b"%d" % self.acts["handed_over"], digest_size=16).digest()
        one = int.from_bytes(drawn[:8], "little") % len(pool)
        other = (one + 1 + int.from_bytes(drawn[8:], "little") % max(1, len(pool) - 1)) % len(pool)
        return min((pool[one], pool[other]), key=lambda i: (replicas[i].used, replicas[i].waiting, i))

    def review(self, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> Sequence[Role]:
        if now < self._changed + self.pause_s:
            return roles
        prompts = [i for i, role in enumerate(roles) if role == "prefill"]
        answers = [i for i, role in enumerate(roles) if role == "decode"]
        waiting = sum(replicas[i].pending for i in prompts) / len(prompts)
        spoken = sum(replicas[i].running + replicas[i].waiting for i in answers) / len(answers)
        found = list(roles)
        if waiting > self.rows and len(answers) > 1:
            found[min(answers, key=lambda i: (replicas[i].running + replicas[i].waiting, i))] = "prefill"
        elif waiting < self.rows / 8 and spoken > self.seqs and len(prompts) > 1:
            found[min(prompts, key=lambda i: (replicas[i].pending, i))] = "decode"
        else:
            return roles
        self.acts["flipped"] += 1
        self._changed = now
        return found
