"""file: cached blocks that the KV pool gives up are kept in a file, behind a memory buffer that is filled ahead of need.

Paper    Gao et al., CachedAttention, arXiv:2403.19708, sections 3.2 and 3.3 (disk below host memory, scheduler-aware fetching)
Rule     a block that the pool evicts is saved if it was hit at least `hits` times: in the file, and in the buffer, where what is
         saved or fetched last pushes out the oldest.  While requests wait, a thread reads what the first `lookahead` of them
         would load, in their order, as many records as the buffer holds
Units    disk, memory: sizes such as "1GiB"; lookahead: waiting requests; hits: references to a block after its first;
         bytes_moved: bytes between pool and tier, both ways
Cost     one copy, one BLAKE2 sum and one write of a block when it is saved, and a read and a sum when it is loaded, inside the
         step; a thread that reads ahead.  Writes go to the page cache, and to the disk when the kernel decides
Pays     as a tier in memory does, where there is more to keep than memory: with four documents in turns and room for one,
         prompts are computed at 1.9 and 2.2 times the speed.  The file was in the page cache then; a disk that is read cold was
         not measured
Differs  single blocks are moved, where the paper moves whole conversations, and they stay in the file when they are loaded; the
         file keeps the blocks used last, where the paper looks at the queue for that, too; nothing is overlapped with layers
Raises   ValueError for a size that cannot be read, and for hits or lookahead < 0; ConfigError where the folder cannot be used
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar

from weft.config import parse_size
from weft.errors import ConfigError
from weft.registry import register
from weft.slots import Tier
from weft.traits import Trait, Traits


@register("kv.offload", "file")
@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """folder: on a disk; by default where the system keeps temporary files.  The file has no name and ends with the process."""

    folder: str = ""
    disk: str = "1GiB"
    memory: str = "64MiB"
    lookahead: int = 4
    hits: int = 0
    acts: dict[str, int] = field(
        default_factory=lambda: {"blocks_saved": 0, "blocks_loaded": 0, "bytes_moved": 0}, init=False, compare=False
    )
    """And, once they happen, prefetched, saves_failed and loads_failed."""
    per_request: ClassVar[bool] = False
    trial: ClassVar[Mapping[str, object]] = {"disk": "64MiB", "memory": "1MiB"}
    traits: ClassVar[Traits] = Traits(gives=frozenset({Trait.HOST_TIER}))

    def __post_init__(self) -> None:
        for name in ("disk", "memory"):
            try:
                parse_size(getattr(self, name))
            except ConfigError as error:
                raise ValueError(f"{name}: {error}") from None
        for name in ("hits", "lookahead"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    @property
    def tiers(self) -> list[Tier]:
        return [Tier("file", parse_size(self.disk), self.folder or None, parse_size(self.memory))]

    def place(self, hits: int) -> int | None:
        return 0 if hits >= self.hits else None

    def prefetch(self, waiting: Sequence[Sequence[int]]) -> Sequence[int]:
        return list(dict.fromkeys(chain.from_iterable(waiting)))

    def count(self, act: str, number: int) -> None:
        self.acts[act] = self.acts.get(act, 0) + number
