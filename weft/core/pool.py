"""The block pool: who holds which block, which blocks are cached, and which may not be reused yet.

All groups of all models draw from one pool of blocks of equal size.  A block is, at any time, one of

    free        nothing of worth in it
    held        referenced by one table or more
    cached      named by the prefix index and referenced by no table: a hit revives it, pressure evicts it
    limbo       let go while a submitted plan still names it; becomes free or cached when that plan commits

Every operation is O(1) or O(log cached).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from weft.errors import CapacityError, InvariantError
from weft.slots import Evict

Key = tuple[int, bytes]
"""(group, prefix name)"""
Spill = Callable[[int, Key], None]
"""Told of a cached block that is about to be reused, and of its name."""


class BlockPool:
    """`blocks` blocks, ids 0 to blocks - 1.  `now`: the engine's time, for the eviction policy."""

    def __init__(self, blocks: int, evict: Evict) -> None:
        if blocks < 1:
            raise CapacityError(f"the KV pool needs at least 1 block, got {blocks}; give weft more --memory")
        self.total = blocks
        self.evict = evict
        self.refs = [0] * blocks
        self.keys: list[Key | None] = [None] * blocks
        self.hits = [0] * blocks
        """References to each block since it was taken, the first one left out."""
        self.index: dict[Key, int] = {}
        self._free = list(range(blocks - 1, -1, -1))
        self._heap: list[tuple[float, int, int]] = []
        self._stamp = [0] * blocks
        self._stamps = 0
        self._cached = 0
        self._limbo: deque[tuple[int, list[int]]] = deque()
        self._in_limbo: dict[int, int] = {}
        self._in_flight: deque[int] = deque()
        self._reserved: dict[int, int] = {}
        self._reserved_total = 0
        self.evictions = 0
        self.now = 0.0

    # ------------------------------------------------------------------ figures

    @property
    def available(self) -> int:
        """Blocks that `take` can give now to somebody without a reservation."""
        return len(self._free) + self._cached - self._reserved_total

    @property
    def cached(self) -> int:
        return self._cached

    @property
    def referenced(self) -> int:
        return self.total - len(self._free) - self._cached - len(self._in_limbo)

    @property
    def limbo(self) -> int:
        return len(self._in_limbo)

    # ------------------------------------------------------------------ reservation

    def reserve(self, owner: int, blocks: int) -> bool:
        """Set aside `blocks` for `owner` (replacing its earlier reservation); False and unchanged if they aren't there."""
        held = self._reserved.get(owner, 0)
        if blocks - held > self.available:
            return False
        self._reserved_total += blocks - held
        if blocks:
            self._reserved[owner] = blocks
        else:
            self._reserved.pop(owner, None)
        return True

    def reserved(self, owner: int) -> int:
        return self._reserved.get(owner, 0)

    def can_take(self, owner: int, blocks: int) -> bool:
        return blocks <= self.available + self._reserved.get(owner, 0)

    # ------------------------------------------------------------------ blocks

    def take(self, owner: int, blocks: int, spill: Spill | None = None) -> list[int]:
        """`blocks` blocks with one reference each, out of `owner`'s reservation first.  Raises CapacityError; ask `can_take`.

        spill: called for each cached block that has to go, while its number of hits stands.
        """
        if not self.can_take(owner, blocks):
            raise CapacityError(f"{blocks} KV blocks wanted, {self.available} available of {self.total}")
        own = self._reserved.get(owner, 0)
        if own:
            self.reserve(owner, own - min(own, blocks))
        out = []
        for _ in range(blocks):
            b = self._free.pop() if self._free else self._evict_one(spill)
            self.refs[b] = 1
            self.hits[b] = 0
            out.append(b)
        return out

    def hold(self, block: int) -> None:
        """One more reference to a block that is held, cached or in limbo."""
        if self.refs[block] == 0:
            if block in self._in_limbo:
                del self._in_limbo[block]
            elif self.keys[block] is not None:
                self._cached -= 1
                self._stamp[block] = 0
            else:
                raise InvariantError(f"block {block} is free and cannot be held")
            self.evict.observe(block, "hit", self.now)
        self.refs[block] += 1
        self.hits[block] += 1

    def drop(self, blocks: Iterable[int]) -> None:
        """One reference less to each block."""
        limbo: list[int] = []
        for b in blocks:
            if self.refs[b] < 1:
                raise InvariantError(f"block {b} is dropped more often than it was held")
            self.refs[b] -= 1
            if self.refs[b] == 0:
                if self._in_flight:
                    limbo.append(b)
                else:
                    self._settle(b)
        if limbo:
            step = self._in_flight[-1]
            self._in_limbo.update(dict.fromkeys(limbo, step))
            self._limbo.append((step, limbo))

    def publish(self, block: int, key: Key) -> bool:
        """Name a full block so that others may hit it; False where that name already stands for another block."""
        if key in self.index or self.keys[block] is not None:
            return self.index.get(key) == block
        self.keys[block] = key
        self.index[key] = block
        self.evict.observe(block, "publish", self.now)
        return True

    def unpublish(self, block: int) -> None:
        """Take a held block out of the index: its holder is about to write over it."""
        key = self.keys[block]
        if key is None or self.refs[block] < 1:
            raise InvariantError(f"block {block} is not held, or not in the index")
        del self.index[key]
        self.keys[block] = None
        self.evict.observe(block, "evict", self.now)

    def lookup(self, group: int, name: bytes) -> int | None:
        return self.index.get((group, name))

    # ------------------------------------------------------------------ plans in flight

    def submitted(self, step: int) -> None:
        """From here on, blocks that are let go are not reused before `committed(step)`."""
        self._in_flight.append(step)

    def committed(self, step: int) -> None:
        if not self._in_flight or self._in_flight[0] != step:
            raise InvariantError(f"step {step} commits out of order; in flight: {list(self._in_flight)}")
        self._in_flight.popleft()
        while self._limbo and self._limbo[0][0] <= step:
            since, blocks = self._limbo.popleft()
            for b in blocks:
                # In the meantime the block may have been revived, and even dropped again into a later limbo.
                if self._in_limbo.get(b) == since:
                    del self._in_limbo[b]
                    self._settle(b)

    def clear_cache(self) -> int:
        """Forget every cached block that nobody holds; returns how many."""
        n = self._cached
        for _ in range(n):
            self._free.append(self._evict_one())
        return n

    # ------------------------------------------------------------------ inside

    def _settle(self, block: int) -> None:
        if self.keys[block] is None:
            self._free.append(block)
            return
        self._cached += 1
        self._stamps += 1
        self._stamp[block] = self._stamps
        self.evict.observe(block, "release", self.now)
        heapq.heappush(self._heap, (self.evict.rank(block, self.now), self._stamps, block))
        if len(self._heap) > 4 * self.total + 64:
            self._heap = [e for e in self._heap if self._stamp[e[2]] == e[1]]
            heapq.heapify(self._heap)

    def _evict_one(self, spill: Spill | None = None) -> int:
        while self._heap:
            rank, stamp, block = heapq.heappop(self._heap)
            if self._stamp[block] != stamp:
                continue
            current = self.evict.rank(block, self.now)
            if current > rank:
                heapq.heappush(self._heap, (current, stamp, block))
                continue
            key = self.keys[block]
            if key is not None:
                del self.index[key]
                if spill is not None:
                    spill(block, key)
            self.keys[block] = None
            self._stamp[block] = 0
            self._cached -= 1
            self.evictions += 1
            self.evict.observe(block, "evict", self.now)
            return block
        raise InvariantError("no block to evict although the accounts say so")

    # ------------------------------------------------------------------ proof

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Every table's blocks against the pool's books; O(total).  Raises InvariantError."""
        counted = [0] * self.total
        for table in tables:
            for b in table:
                counted[b] += 1
        for b, (want, have) in enumerate(zip(counted, self.refs, strict=True)):
            if want != have:
                raise InvariantError(f"block {b} has {have} references, but {want} tables name it")
        free = set(self._free)
        if len(free) != len(self._free):
            raise InvariantError("a block is twice in the free list")
        cached = {b for b in range(self.total) if self._stamp[b]}
        if len(cached) != self._cached:
            raise InvariantError(f"{len(cached)} blocks are cached, the count says {self._cached}")
        for b in range(self.total):
            places = (b in free) + (b in cached) + (b in self._in_limbo) + (self.refs[b] > 0)
            if places != 1:
                raise InvariantError(f"block {b} is in {places} places at once (free, cached, limbo, held)")
            if b in free and self.keys[b] is not None:
                raise InvariantError(f"block {b} is free but still named")
        for key, b in self.index.items():
            if self.keys[b] != key:
                raise InvariantError(f"the index names block {b}, which bears another name")
        if sum(key is not None for key in self.keys) != len(self.index):
            raise InvariantError("a block bears a name that the index does not have")
        resting = {(b, step) for step, blocks in self._limbo for b in blocks}
        if not resting.issuperset(self._in_limbo.items()):
            raise InvariantError("a block is in limbo, and no plan in flight will let it go")
        if self._reserved_total != sum(self._reserved.values()) or self.available < 0:
            raise InvariantError(f"reservations ({self._reserved_total}) exceed what is available")
