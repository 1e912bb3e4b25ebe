"""Protocols of the KV slots: what is evicted, compressed, encoded, and kept below the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol


class Evict(Protocol):
    """Slot `kv.evict`: which cached block goes first.

    observe   event is "publish", "hit", "release" or "evict"
    rank      blocks go in ascending rank; a block's rank may only grow while the block stays cached
    """

    def observe(self, block: int, event: str, now: float) -> None: ...
    def rank(self, block: int, now: float) -> float: ...


class Compress(Protocol):
    """Slot `kv.compress`: how many entries a sequence keeps in each full group, and which.

    budget  entries that a full group holds at most, at any moment, for a context of `limit` positions (pure; memory is planned
            with it): what stays after a cut, and what comes before the next
    cuts    the smallest position above `position` at which entries are dropped, None if there is none (pure).  A step never
            crosses a cut, recomputation replays the same ones, and nothing before the first one is changed
    keep    which entries of one group stay, at a cut (tensors).  The view has prompt and length (tokens), entries, layers (ids),
            kv_heads, head_dim; positions, int64 [entries]; keys(layer) and values(layer), float32 [entries, kv heads, head_dim];
            mass, float64 [layers, kv heads, entries], the attention that each entry got, where the technique needs
            ATTENTION_MASS, otherwise None

    observe_rows: where the technique needs ATTENTION_MASS, how many rows before the first cut (or before the prompt's end, where
    that comes first) have their attention counted, None for all; rows after them always count.  `history` of such an instance
    is the same number, so that a prefix hit hides none of them.
    """

    def budget(self, prompt: int, limit: int) -> int: ...
    def cuts(self, prompt: int, position: int) -> int | None: ...
    def keep(self, view: Any) -> Kept: ...


@dataclass(frozen=True, slots=True)
class Kept:
    """indices: entries that stay, int64, ascending: [N] for all heads alike, or [layers, kv heads, N].

    rotate: (delta, first, stop): after packing, entries [first, stop) move by delta positions and their keys turn with them.
    """

    indices: Any
    rotate: tuple[int, int, int] | None = None


class Store(Protocol):
    """Slot `kv.store`: number format of stored KV.  A row is one entry's key (or value) of one kv head.

    row_bytes   of a row of `head_dim` values (pure; memory is planned with it)
    encode      [N, head_dim] of the model's dtype to uint8 [N, row_bytes]
    decode      uint8 [N, row_bytes] to float32 [N, head_dim]

    Where a class says of itself, not of those that inherit from it, that its encoding is one that weft's kernels know (`kernels`,
    "int8"), they encode and decode in its place, and say with `encoded` how many rows they wrote.
    """

    kernels: ClassVar[str] = ""

    def row_bytes(self, head_dim: int) -> int: ...
    def encode(self, rows: Any) -> Any: ...
    def decode(self, rows: Any) -> Any: ...
    def encoded(self, rows: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Tier:
    """A place for cached blocks below the pool.

    kind: memory, or a file that is made in `folder` (None: where the system keeps temporary files) and has no name, or memory
    that several engines share.  bytes: what its records may take.  buffer_bytes: memory in front of a file, for what was saved
    last and what is fetched ahead.  fd: of the shared memory.
    """

    kind: Literal["memory", "file", "shared"]
    bytes: int
    folder: str | None = None
    buffer_bytes: int = 0
    fd: int = -1


class Offload(Protocol):
    """Slot `kv.offload`: which tier holds a block that the pool gives up, when to fetch.  Pure; `exec.tiers` moves the bytes.

    tiers      what lies below the pool
    lookahead  requests at the head of the queue whose stored blocks `prefetch` is told of
    place      the tier (its index) for a cached block that was hit so many times while it was in the pool; None: it is dropped
    prefetch   which stored blocks to bring nearer.  waiting: for each request, in order, the tickets that it would load
    count      so many more of an act, as "blocks_saved"
    """

    @property
    def tiers(self) -> Sequence[Tier]: ...
    @property
    def lookahead(self) -> int: ...
    def place(self, hits: int) -> int | None: ...
    def prefetch(self, waiting: Sequence[Sequence[int]]) -> Sequence[int]: ...
    def count(self, act: str, number: int) -> None: ...
