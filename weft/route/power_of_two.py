"""Power of two choices: of two replicas drawn by chance, the one with fewer sequences.

Paper    Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, IEEE TPDS 12(10), 2001
Rule     draw i and j, i != j; the one with fewer running and waiting sequences, of equals i
Units    sequences
Cost     O(1) a request: two replicas are looked at
Pays     with many replicas, of which only two are asked; `weft policies` has the figures
Differs  the draw is a function of seed and the number of the request, so that a run can be repeated
Raises   nothing
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.slots import Claim, ReplicaView
from weft.traits import Traits


@register("route", "power_of_two")
@dataclass(slots=True, kw_only=True)
class PowerOfTwo:
    seed: int = 0
    acts: dict[str, int] = field(default_factory=lambda: {"compared": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits()
    looks: ClassVar[bool] = True
    claim: ClassVar[Claim] = Claim(
        "nearly the balance of asking everybody, by asking two",
        "ttft_s.p99", 1.0, "less", against="round_robin", case="replicas",
    )  # fmt: skip

    def choose(self, prompt: Sequence[int], tenant: bytes, replicas: Sequence[ReplicaView], now: float) -> int:
        n = len(replicas)
        if n == 1:
            return 0
        self.acts["compared"] += 1
        drawn = hashlib.blake2b(b"%d %d" % (self.seed, self.acts["compared"]), digest_size=16).digest()
        i = int.from_bytes(drawn[:8], "little") % n
        j = (i + 1 + int.from_bytes(drawn[8:], "little") % (n - 1)) % n
        one, other = replicas[i], replicas[j]
        return i if one.running + one.waiting <= other.running + other.waiting else j
