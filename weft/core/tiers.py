"""What lies below the pool: which cached blocks are stored in which tier, under which ticket.  The bytes are the executor's.

A tier is a row of records of equal size, each with room for one block.  A *ticket* says which record holds a block and in
which of the record's lives: `serial * records + slot`, slots being counted over all tiers.  A ticket is never given twice, so
that a record that was written over, or never written, is told from the one that was meant.

Plans are carried out in order, so a block counts as stored from the moment in which its SAVE was planned.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

from weft.core.pool import BlockPool, Key, Spill
from weft.errors import ConfigError, InvariantError
from weft.slots import Offload, Tier
from weft.types import GroupSpec, KVOp, KVOpKind

TICKET_BYTES = 8
CHECKSUM_BYTES = 32


def record_bytes(groups: Sequence[GroupSpec], block_bytes: int) -> int:
    """Bytes of one stored block: its ticket, its checksum, its entries and their positions."""
    return TICKET_BYTES + CHECKSUM_BYTES + block_bytes + 4 * max(g.block_tokens for g in groups)


def records(tiers: Sequence[Tier], size: int) -> list[int]:
    """How many records of `size` bytes each tier holds.  Raises ConfigError where one holds none, or there is none."""
    if not tiers:
        raise ConfigError("kv.offload: a technique of this slot has at least one tier")
    for tier in tiers:
        if tier.bytes < size:
            raise ConfigError(
                f"kv.offload: {tier.bytes} bytes of {tier.kind} hold no block of the KV pool, which takes {size}; give it more"
            )
    return [tier.bytes // size for tier in tiers]


def memory_bytes(tiers: Sequence[Tier]) -> int:
    """Memory that tiers take at most, the buffers in front of files included."""
    return sum(tier.bytes if tier.kind == "memory" else tier.buffer_bytes for tier in tiers)


class TierIndex:
    """Names of stored blocks and their tickets, each tier with its own order of use.  size: bytes of one record."""

    def __init__(self, offload: Offload, size: int, pool: BlockPool) -> None:
        self.offload, self.pool = offload, pool
        self.capacity = records(offload.tiers, size)
        self.total = sum(self.capacity)
        self._tickets: dict[Key, int] = {}
        self._used: list[OrderedDict[int, Key]] = [OrderedDict() for _ in self.capacity]
        """By tier: ticket -> name, least recently used first."""
        starts = [sum(self.capacity[:i]) for i in range(len(self.capacity))]
        self._free = [list(range(start + n - 1, start - 1, -1)) for start, n in zip(starts, self.capacity, strict=True)]
        self._starts = starts
        self._pinned: Counter[int] = Counter()
        self._serial = 0

    def __len__(self) -> int:
        return len(self._tickets)

    # ------------------------------------------------------------------ between pool and tiers

    def find(self, group: int, name: bytes) -> int | None:
        """A block of the pool, or ~ticket of a stored one, or None."""
        block = self.pool.lookup(group, name)
        ticket = self._tickets.get((group, name)) if block is None else None
        return block if ticket is None else ~ticket

    def spill(self, ops: list[KVOp]) -> Spill:
        """What the pool calls for a cached block before it is reused: it is saved first, if a tier takes it."""

        def save(block: int, key: Key) -> None:
            ticket = self.save(key, self.pool.hits[block])
            if ticket is not None:
                ops.append(KVOp(KVOpKind.SAVE, key[0], (block,), (), (ticket,)))

        return save

    def hold(self, tickets: Sequence[int]) -> None:
        """Stored blocks that are about to be loaded: none of them is written over before `load`.

        Their use counts from a prefix's end on, so that its beginning stays longest.
        """
        for ticket in reversed(tickets):
            self._used[self._tier(ticket)].move_to_end(ticket)
            self._pinned[ticket] += 1

    def load(self, owner: int, group: int, tickets: Sequence[int], ops: list[KVOp]) -> list[int]:
        """Fresh blocks of the pool, into which the plan loads what is held."""
        blocks = self.pool.take(owner, len(tickets), self.spill(ops))
        self._pinned.subtract(tickets)
        self._pinned = +self._pinned
        ops.append(KVOp(KVOpKind.LOAD, group, (), tuple(blocks), tuple(tickets)))
        return blocks

    # ------------------------------------------------------------------ books

    def save(self, key: Key, hits: int) -> int | None:
        """The ticket under which a block that the pool gives up is to be saved; None where there is nothing to be moved."""
        known = self._tickets.get(key)
        if known is not None:
            self._used[self._tier(known)].move_to_end(known)
            return None
        tier = self.offload.place(hits)
        if tier is None:
            return None
        if not 0 <= tier < len(self.capacity):
            raise InvariantError(f"kv.offload placed a block in tier {tier}; there are {len(self.capacity)}")
        slot = self._room(tier)
        if slot is None:
            return None
        self._serial += 1
        ticket = self._serial * self.total + slot
        self._tickets[key] = ticket
        self._used[tier][ticket] = key
        return ticket

    def forget(self, ticket: int) -> None:
        """The record is not there, or is damaged.  Twice does no harm."""
        tier = self._tier(ticket)
        key = self._used[tier].pop(ticket, None)
        if key is not None:
            del self._tickets[key]
            self._free[tier].append(ticket % self.total)

    def check(self) -> None:
        """Every ticket against the tiers' records.  Raises InvariantError."""
        if self._pinned:
            raise InvariantError(f"stored blocks are pinned between plans: {sorted(self._pinned)}")
        named = {ticket: key for key, ticket in self._tickets.items()}
        if len(named) != len(self._tickets) or named != {t: k for used in self._used for t, k in used.items()}:
            raise InvariantError("the names of stored blocks and the tiers' records do not agree")
        for tier, (used, free) in enumerate(zip(self._used, self._free, strict=True)):
            slots = sorted([*(t % self.total for t in used), *free])
            start = self._starts[tier]
            if slots != list(range(start, start + self.capacity[tier])):
                raise InvariantError(f"tier {tier} has lost records, or has one twice")

    # ------------------------------------------------------------------ inside

    def _tier(self, ticket: int) -> int:
        slot = ticket % self.total
        return max(i for i, start in enumerate(self._starts) if start <= slot)

    def _room(self, tier: int) -> int | None:
        """A free record, or the one used longest ago; None where everything is about to be loaded."""
        if self._free[tier]:
            return self._free[tier].pop()
        oldest = next((t for t in self._used[tier] if t not in self._pinned), None)
        if oldest is None:
            return None
        del self._tickets[self._used[tier].pop(oldest)]
        return oldest % self.total
