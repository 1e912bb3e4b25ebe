"""Prefix aware: where the longest part of a prompt was computed before, unless that replica has too much to do.

Paper    Zheng et al., SGLang, arXiv:2312.07104 (its router); Srivatsa et al., Preble, arXiv:2407.00023
Rule     the replica that last saw the longest prefix of the prompt, where that is at least `least` of it and its sequences are at
         most the fewest + slack; else the one with the fewest
Units    block: tokens by which prefixes are told apart.  slack: sequences.  least: share of the prompt
Cost     one hash for each block of a prompt; `most` prefixes are remembered, the least recently used forgotten
Pays     where prompts of a conversation or of an agent begin alike; `weft policies` has the figures
Differs  the router remembers what it sent where, and is not told what replicas have evicted
Raises   ValueError for a block, most or slack below 1, or a share outside [0, 1]
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.registry import register
from weft.slots import Claim, ReplicaView
from weft.traits import Traits


@register("route", "prefix_aware")
@dataclass(slots=True, kw_only=True)
class PrefixAware:
    block: int = 128
    most: int = 100_000
    slack: int = 16
    least: float = 0.25
    acts: dict[str, int] = field(default_factory=lambda: {"followed": 0, "balanced": 0}, init=False, compare=False)
    traits: ClassVar[Traits] = Traits()
    looks: ClassVar[bool] = True
    claim: ClassVar[Claim] = Claim(
        "prompts that begin alike meet the cache that has their beginning",
        "cached_tokens", 1.5, "more", against="round_robin", case="prefixes",
    )  # fmt: skip
    _seen: OrderedDict[bytes, int] = field(default_factory=OrderedDict, init=False, compare=False)

    def __post_init__(self) -> None:
        if self.block < 1 or self.most < 1 or self.slack < 1 or not 0 <= self.least <= 1:
            raise ValueError("block, most and slack are at least 1, and least is a share from 0 to 1")

    def choose(self, prompt: Sequence[int], tenant: bytes, replicas: Sequence[ReplicaView], now: float) -> int:
        names = self._names(prompt, tenant)
        found, depth = -1, 0
        for i, name in enumerate(names):
            there = self._seen.get(name)
            if there is None or there >= len(replicas):
                break
            found, depth = there, i + 1
        loads = [r.running + r.waiting for r in replicas]
        fewest = min(range(len(loads)), key=lambda i: (loads[i], i))
        follows = found >= 0 and depth * self.block >= self.least * len(prompt)
        chosen = found if follows and loads[found] <= loads[fewest] + self.slack else fewest
        self.acts["followed" if follows and chosen == found else "balanced"] += 1
        for name in names:
            self._seen[name] = chosen
            self._seen.move_to_end(name)
        while len(self._seen) > self.most:
            self._seen.popitem(last=False)
        return chosen

    def _names(self, prompt: Sequence[int], tenant: bytes) -> list[bytes]:
        """A chain of names of the prompt's prefixes of whole blocks."""
        data = array("q", prompt).tobytes()
        size, names, name = 8 * self.block, [], hashlib.blake2b(tenant, digest_size=16).digest()
        for at in range(0, len(data) - size + 1, size):
            name = hashlib.blake2b(name + data[at : at + size], digest_size=16).digest()
            names.append(name)
        return names
