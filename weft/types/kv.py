"""KV groups, block tables and the closed set of instructions on blocks."""

from __future__ import annotations

import enum

from msgspec import Struct


class GroupKind(enum.StrEnum):
    FULL = "full"
    WINDOW = "window"
    LATENT = "latent"
    STATE = "state"
    PARKED = "parked"
    SHARED = "shared"


class GroupSpec(Struct, frozen=True, kw_only=True):
    """A KV group: layers (and heads) of one model whose entries live and die together.

    entry_bytes: bytes of one entry over all of `layers`.  block_tokens: entries in one block of the shared pool;
    block_tokens * entry_bytes <= the pool's block_bytes.  window: positions that a query sees, itself included
    (WINDOW only).  heads: KV heads that the group holds; () means all.
    """

    name: str
    kind: GroupKind
    layers: tuple[int, ...]
    entry_bytes: int
    block_tokens: int
    model: str = "target"
    heads: tuple[int, ...] = ()
    window: int | None = None

    def __post_init__(self) -> None:
        if self.block_tokens < 1 or self.entry_bytes < 1:
            raise ValueError(f"group {self.name}: block_tokens and entry_bytes must be at least 1")
        if (self.kind is GroupKind.WINDOW) != (self.window is not None):
            raise ValueError(f"group {self.name}: a window belongs to kind 'window' and to no other")
        if self.window is not None and self.window < 1:
            raise ValueError(f"group {self.name}: window must be at least 1")


class KVOpKind(enum.StrEnum):
    COPY = "copy"
    MOVE = "move"
    COMPACT = "compact"
    ROTATE = "rotate"
    REWRITE = "rewrite"
    ZERO = "zero"
    LOAD = "load"
    SAVE = "save"


class KVOp(Struct, frozen=True):
    """One instruction of the closed KV set, over block ids of one group; carried out before the plan's works, in order.

    argument of SAVE and LOAD: a ticket for each block of source or target, which says where below the pool it is stored.
    """

    kind: KVOpKind
    group: int
    source: tuple[int, ...] = ()
    target: tuple[int, ...] = ()
    argument: tuple[int, ...] = ()


class SharedKV(Struct, frozen=True):
    """Memory that several engines share, in which one hands prompts over to others.  fd: of the file, in each of them.  bytes:
    what its records may take.  writes: whether this engine is the one."""

    fd: int
    bytes: int
    writes: bool


class Grant(Struct, frozen=True):
    """Changes of one request's block table in one group: `blocks` stand from index `at` on; what stood there is replaced.

    first: entries that the table no longer holds at its head (a window slides, whole blocks only); index 0 of the table is
    entry `first`.  `at` counts in the table after the head was dropped.
    """

    request: int
    group: int
    at: int
    blocks: tuple[int, ...]
    first: int = 0
