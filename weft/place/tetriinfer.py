"""TetriInfer: prompts and answers on instances of their own, which change sides as the load does.

Paper    Hu et al., Inference without Interference, arXiv:2401.11181                               (002-65)
Rule     a prompt goes to the prefill instance with the fewest pending rows. The length of its answer is predicted as a bucket, of
         which the lower end counts; of decode instances that have room for all that they are predicted to hold with it, two are
         drawn by chance: a heavy answer goes to the one with the smaller share of heavy ones, a light one to that with less to
         hold. Where the rows before each prefill instance exceed `rows`, the decode instance with the fewest sequences changes
         sides, and where they fall below an eighth of that and sequences exceed `seqs` for each decode instance, the prefill
         instance with the fewest rows does
Units    prefill: instances at first; rows: of prompts; seqs: sequences; pause_s: seconds between changes; bucket, heavy: tokens
         of an answer; accuracy: share of predictions that name the right bucket
Cost     O(instances) a request; an instance that changes sides ends what it has in hand beside its new work
Pays     where the proportion of prompts to answers changes; where it does not, the best fixed proportion is as good
Differs  the prediction is the answer's true bucket, or at a rate one beside it (75 % are right in the paper, of a model of 125M
         parameters, which is not run here); what it says of light answers is not in the paper; chunks are those of the schedule
         (`splitfuse(budget=512)` has the paper's); an instance changes sides by what waits, not by a minute of idleness
Raises   ValueError for prefill, rows, seqs or bucket below 1, pause_s or heavy < 0, or an accuracy that is no share
"""

from __future__ import annotations

import hashlib
from collections import Counter
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


@register("place", "tetriinfer")
@dataclass(slots=True, kw_only=True)
class TetriInfer:
    """Roles that follow the load, and answers that are spread by their predicted length."""

    prefill: int = 1
    rows: int = 6000
    seqs: int = 64
    pause_s: float = 2.0
    bucket: int = 200
    heavy: int = 128
    accuracy: float = 0.75
    _changed: float = field(default=-1e9, init=False, compare=False)
    _there: dict[int, tuple[int, int, bool]] = field(default_factory=dict, init=False, compare=False)
    """By request: its instance, what it is predicted to hold, and whether it is heavy."""
    _holds: Counter[int] = field(default_factory=Counter, init=False, compare=False)
    _kinds: Counter[tuple[int, bool]] = field(default_factory=Counter, init=False, compare=False)
    acts: dict[str, int] = field(
        default_factory=lambda: {"handed_over": 0, "flipped": 0, "misread": 0}, init=False, compare=False
    )
    traits: ClassVar[Traits] = Traits()
    exposed: ClassVar[float] = 1.0
    flips: ClassVar[bool] = True
    claim: ClassVar[Claim] = Claim(
        "mean job completion 47 % shorter than of mixed batches, on loads that mix light and heavy phases", "e2e_s.mean", 0.53,
        "less", against="least_loaded", case="shifting",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if min(self.prefill, self.rows, self.seqs, self.bucket) < 1 or min(self.pause_s, self.heavy) < 0:
            raise ValueError("prefill, rows, seqs and bucket are at least 1, pause_s and heavy not below 0")
        if not 0 <= self.accuracy <= 1:
            raise ValueError(f"accuracy is a share from 0 to 1, got {self.accuracy}")

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

    def handoff(self, request: Handed, replicas: Sequence[ReplicaView], roles: Sequence[Role], now: float) -> int:
        self.acts["handed_over"] += 1
        drawn = hashlib.blake2b(b"%d" % self.acts["handed_over"], digest_size=16).digest()
        length = self.predict(request.answer, drawn[-1] / 256, drawn[-2] % 2 == 0)
        holds, heavy = request.prompt + length, length > self.heavy
        pool = [i for i, role in enumerate(roles) if role == "decode"]
        roomy = [i for i in pool if self._holds[i] + holds <= request.room] or pool
        one = int.from_bytes(drawn[:6], "little") % len(roomy)
        other = (one + 1 + int.from_bytes(drawn[6:12], "little") % max(1, len(roomy) - 1)) % len(roomy)
        best = min((roomy[one], roomy[other]), key=lambda i: (self._share(i) if heavy else 0.0, self._holds[i], i))
        self._there[request.id] = best, holds, heavy
        self._holds[best] += holds
        self._kinds[best, heavy] += 1
        return best

    def predict(self, answer: int, drawn: float, above: bool) -> int:
        """The lower end of the bucket that an answer is thought to fall into: its own, or by chance one beside it."""
        right = answer // self.bucket
        if drawn >= self.accuracy:
            self.acts["misread"] += 1
            right = right + 1 if above or not right else right - 1
        return right * self.bucket

    def _share(self, i: int) -> float:
        heavy, light = self._kinds[i, True], self._kinds[i, False]
        return heavy / (heavy + light) if heavy else 0.0

    def ended(self, id: int) -> None:
        if id not in self._there:
            return  # its answer ended with its prompt
        i, holds, heavy = self._there.pop(id)
        self._holds[i] -= holds
        self._kinds[i, heavy] -= 1

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
