"""What lies below the pool: which cached blocks are stored in which tier, under which ticket.  The bytes are the executor's.

A tier is a row of records of equal size, each with room for one block.  A *ticket* says which record holds a block and in
which of the record's lives: `serial * records + slot`, slots being counted over all tiers.  A ticket is never given twice, so
that a record that was written over, or never written, is told from the one that was meant.

Plans are carried out in order, so a block counts as stored from the moment in which its SAVE was planned.

Between engines (`Exchange`) one writes the records and tells the tickets, and the others read them.  Nobody waits for anybody: a
record that was written over meanwhile is told by its ticket, and what it held is computed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

from weft.core.pool import BlockPool, Key, Spill
from weft.errors import ConfigError, InvariantError
from weft.slots import Offload, Tier
from weft.types import GroupSpec, KVOp, KVOpKind, SharedKV

TICKET_BYTES = 8
LIFE_BITS = 32
"""Of a ticket's serial number: records that an engine may write in its life."""
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
    return sum(tier.buffer_bytes if tier.kind == "file" else tier.bytes for tier in tiers)


class Exchange:
    """What stands in the slot `kv.offload` of engines that hand prompts over: nothing goes there because it is evicted."""

    lookahead = 0

    def __init__(self, shared: SharedKV) -> None:
        self.tiers = [Tier("shared", shared.bytes, fd=shared.fd)]

    def place(self, hits: int) -> int | None:
        return None

    def prefetch(self, waiting: Sequence[Sequence[int]]) -> Sequence[int]:
        return ()

    def count(self, act: str, number: int) -> None: ...


class TierIndex:
    """Names of stored blocks and their tickets, each tier with its own order of use.  size: bytes of one record.

    life: how many engines have written to a shared tier before, so that no ticket of theirs is given again; None for an engine
    that only reads there, whose tickets are all another's.
    """

    def __init__(self, offload: Offload, size: int, pool: BlockPool, life: int | None = 0) -> None:
        self.offload, self.pool, self._reads = offload, pool, life is None
        self.capacity = records(offload.tiers, size)
        self.total = sum(self.capacity)
        self._tickets: dict[Key, int] = {}
        self._used: list[OrderedDict[int, Key]] = [OrderedDict() for _ in self.capacity]
        """By tier: ticket -> name, least recently used first."""
        starts = [sum(self.capacity[:i]) for i in range(len(self.capacity))]
        self._free = [list(range(start + n - 1, start - 1, -1)) for start, n in zip(starts, self.capacity, strict=True)]
        self._starts = starts
        self._pinned: Counter[int] = Counter()
        self._serial = (life or 0) << LIFE_BITS
        self._slots: dict[int, int] = {}
        """By slot, the ticket that another engine has told last."""

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
        return None if tier is None else self._enter(key, tier)

    def hand_over(self, group: int, names: Sequence[bytes], blocks: Sequence[int]) -> list[KVOp]:
        """What stores those of these blocks that are not there yet, no more of them than there is room for; it counts as stored
        from now on.
        """
        fresh: list[tuple[int, int]] = []
        for name, block in list(zip(names, blocks, strict=True))[: self.capacity[0]]:
            known = self._tickets.get((group, name))
            if known is not None:
                self._used[0].move_to_end(known)
            elif (ticket := self._enter((group, name), 0)) is not None:
                fresh.append((block, ticket))
        if not fresh:
            return []
        return [KVOp(KVOpKind.SAVE, group, tuple(b for b, _ in fresh), (), tuple(t for _, t in fresh))]

    def tickets(self, group: int, names: Sequence[bytes]) -> tuple[int, ...]:
        """Of these names; 0 for what is not stored."""
        return tuple(self._tickets.get((group, name), 0) for name in names)

    def told(self, group: int, names: Sequence[bytes], tickets: Sequence[int]) -> None:
        """Another engine has stored these blocks under these tickets; 0 for none.  It may write over them at any time."""
        for name, ticket in zip(names, tickets, strict=False):
            if not ticket:
                continue
            for old in (self._slots.get(ticket % self.total), self._tickets.get((group, name))):
                if old is not None:
                    self.forget(old)
            self._slots[ticket % self.total] = ticket
            self._tickets[group, name] = ticket
            self._used[0][ticket] = (group, name)

    def _enter(self, key: Key, tier: int) -> int | None:
        """A ticket for a block in a tier; None where everything there is about to be loaded."""
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
            if self._reads:
                del self._slots[ticket % self.total]
            else:
                self._free[tier].append(ticket % self.total)

    def check(self) -> None:
        """Every ticket against the tiers' records.  Raises InvariantError."""
        if self._pinned:
            raise InvariantError(f"stored blocks are pinned between plans: {sorted(self._pinned)}")
        named = {ticket: key for key, ticket in self._tickets.items()}
        if len(named) != len(self._tickets) or named != {t: k for used in self._used for t, k in used.items()}:
            raise InvariantError("the names of stored blocks and the tiers' records do not agree")
        if self._reads:
            if sorted(self._slots.values()) != sorted(self._used[0]):
                raise InvariantError("two blocks are awaited from one record of another engine")
            return
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
