"""host: cached blocks that the KV pool gives up are kept in memory beside it, and come back when their prefix is asked for.

Paper    Gao et al., CachedAttention, arXiv:2403.19708, section 3.2 (the host tier of its hierarchy)
Rule     a block that the pool evicts is saved if it was hit at least `hits` times; the record used longest ago makes room; a
         prefix is served by the blocks of the pool and of the tier together, for as long as every group has one or the other
Units    memory: a size such as "256MiB"; hits: references to a block after its first; bytes_moved: bytes, both ways; threads:
         that move blocks beside a step, 0 for all in it
Cost     one copy and one BLAKE2 sum of a block when it is saved, and again when it is loaded, inside the step or on a thread
Pays     where prompts begin as earlier ones did that the pool had to give up: with four documents in turns and room for one,
         prompts are computed at 2.1 and 2.4 times the speed.  Nothing is gained where the pool holds what comes back
Differs  single blocks are moved, where the paper moves whole conversations, when they are evicted and not ahead of it; nothing is
         overlapped with layers.  On a CPU, memory beside the pool is worth having where the pool is full of longer rows or of
         fewer blocks than the machine could hold; on a GPU it is the host's memory, far larger than the device's
Raises   ValueError for a size that cannot be read, for hits < 0 and for threads outside 0 to 16
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from weft.config import parse_size
from weft.errors import ConfigError
from weft.registry import register
from weft.slots import Tier
from weft.traits import Trait, Traits


@register("kv.offload", "host")
@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The same bytes come back, so answers are the same; only the time until the first token changes."""

    memory: str = "256MiB"
    hits: int = 0
    threads: int = 0
    acts: dict[str, int] = field(
        default_factory=lambda: {"blocks_saved": 0, "blocks_loaded": 0, "bytes_moved": 0}, init=False, compare=False
    )
    """And, once they happen, saves_failed and loads_failed."""
    lookahead: ClassVar[int] = 0
    per_request: ClassVar[bool] = False
    trial: ClassVar[Mapping[str, object]] = {"memory": "64MiB"}
    traits: ClassVar[Traits] = Traits(gives=frozenset({Trait.HOST_TIER}))

    def __post_init__(self) -> None:
        try:
            parse_size(self.memory)
        except ConfigError as error:
            raise ValueError(f"memory: {error}") from None
        if self.hits < 0:
            raise ValueError(f"hits must be at least 0, got {self.hits}")
        if not 0 <= self.threads <= 16:
            raise ValueError(f"threads is a number from 0 to 16, got {self.threads}")

    @property
    def tiers(self) -> list[Tier]:
        return [Tier("memory", parse_size(self.memory))]

    def place(self, hits: int) -> int | None:
        return 0 if hits >= self.hits else None

    def prefetch(self, waiting: Sequence[Sequence[int]]) -> Sequence[int]:
        return ()

    def count(self, act: str, number: int) -> None:
        self.acts[act] = self.acts.get(act, 0) + number
