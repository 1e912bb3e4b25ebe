"""Block tables of requests over the pool: prefix hits, growth, sliding windows, copy on write, publication.

The only place where tables change.  Legend: `m` model index; a table's *physical* index counts entries from its head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from weft.core import prefix
from weft.core.pool import BlockPool
from weft.core.request import Request, State, Table
from weft.core.tiers import TierIndex
from weft.errors import InvariantError
from weft.types import GroupKind, GroupSpec, KVOp, KVOpKind


class KV:
    """groups: of all models; models: their names, the target first.  share: whether prefixes are shared at all.

    tiers: what lies below the pool, where cached blocks go that it gives up.  In the tables of a match, `~ticket` stands for a
    block that would have to be loaded.
    """

    def __init__(
        self,
        groups: Sequence[GroupSpec],
        pool: BlockPool,
        models: Sequence[str] = ("target",),
        *,
        settings: bytes = b"",
        share: bool = True,
        tiers: TierIndex | None = None,
    ) -> None:
        self.groups = list(groups)
        self.models = tuple(models)
        self.pool = pool
        self.tiers = tiers
        self.settings = settings
        self.share = share
        self.by_model: list[list[int]] = [
            [g for g, spec in enumerate(groups) if spec.model == name and spec.kind is not GroupKind.PARKED]
            for name in models
        ]
        self.parked: list[int | None] = [
            next((g for g, s in enumerate(groups) if s.model == name and s.kind is GroupKind.PARKED), None)
            for name in models
        ]
        self.sliding: list[list[int]] = [
            [g for g in mine if self.groups[g].window is not None] for mine in self.by_model
        ]
        self._roots: dict[tuple[bytes, bytes], bytes] = {}
        self._sources: list[int] = []
        """Sources of the copies of the plan in the making: held until it is submitted, so that nobody writes them before."""
        for m, name in enumerate(models):
            if not self.by_model[m]:
                raise InvariantError(f"model {name} has no KV group")

    # ------------------------------------------------------------------ prefix hits

    def match(self, request: Request, *, stored: bool = True) -> tuple[list[int], list[dict[int, list[int]]], int]:
        """(tokens, tables) that the index offers for each model, and how many blocks that nobody holds now it takes.

        stored: blocks below the pool may stand in for those that it has lost.  Changes nothing but the request's memo of names.
        """
        lengths, tables, idle = [], [], 0
        lookup = self.tiers.find if stored and self.tiers else self.pool.lookup
        cap = self.hit_cap(request)
        for groups in self.by_model:
            length, found = 0, dict[int, list[int]]()
            if cap > 0:
                specs = [(g, self.groups[g]) for g in groups]
                for _, spec in specs:
                    self._name(request, spec.block_tokens, cap)
                length, found = prefix.longest_hit(specs, request.names, lookup, cap)
                while length != (whole := request.whole(length)):
                    length, found = prefix.longest_hit(specs, request.names, lookup, whole)
            lengths.append(length)
            tables.append(found)
            idle += sum(b < 0 or self.pool.refs[b] == 0 for blocks in found.values() for b in blocks)
        return lengths, tables, idle

    def stored(self, request: Request) -> list[int]:
        """Tickets that a match of the request would load."""
        return [~b for found in self.match(request)[1] for blocks in found.values() for b in blocks if b < 0]

    def hit_cap(self, request: Request) -> int:
        """Tokens that may come from the index.

        The last one is always computed, for its logits; so are the positions that a technique reads, that a cut acts on, or whose
        logprobs are still to be told, and all of them where their hidden states are averaged.
        """
        if not (self.share and request.publishes) or request.sampling.pooling == "mean":
            return 0
        cap = min(len(request.context) - 1, request.common)
        if request.history:
            cap = min(cap, request.prompt - request.history)
        if request.cut is not None and (first := request.cut(request.prompt, 0)) is not None:
            # What a technique reads of the rows before a cut that comes within the prompt has to be computed, too.
            cap = min(cap, first - 1, first - request.history)
        if request.sampling.prompt_logprobs >= 0 and request.reported < request.prompt - 1:
            cap = min(cap, request.reported)
        return max(0, cap)

    def hold(self, tables: list[dict[int, list[int]]]) -> None:
        """One more reference to each block of a match, so that nothing that comes before `adopt` evicts it."""
        for blocks in (blocks for found in tables for blocks in found.values()):
            for b in blocks:
                if b >= 0:
                    self.pool.hold(b)
            if self.tiers is not None:
                self.tiers.hold([~b for b in blocks if b < 0])

    def adopt(self, request: Request, lengths: list[int], tables: list[dict[int, list[int]]], ops: list[KVOp]) -> None:
        """Make a match that is held the request's own.  What is stored is loaded into blocks of its own, which are offered to the
        index like computed ones, once the plan has committed; the caller has seen that they are there.
        """
        for m, found in enumerate(tables):
            for g, blocks in found.items():
                table, spec = request.tables[g], self.groups[g]
                first = prefix.first_block(spec, lengths[m])
                table.blocks = list(blocks)
                table.first = first * spec.block_tokens
                table.count = lengths[m] - table.first
                table.published = lengths[m] // spec.block_tokens
                table.dirty = 0
                at = [i for i, b in enumerate(blocks) if b < 0]
                if self.tiers is not None and at:
                    fresh = self.tiers.load(request.rid, g, [~blocks[i] for i in at], ops)
                    for i, block in zip(at, fresh, strict=True):
                        table.blocks[i] = block
                    table.published = first + at[0]
                    request.loading = True
            request.computed[m] = request.planned[m] = lengths[m]

    # ------------------------------------------------------------------ growth

    def slide(self, request: Request, m: int, start: int) -> None:
        """Drop the head blocks that no query from position `start` on can see.

        Rows in flight may fall short and be planned anew, so what they see stays until they have committed.
        """
        start = min(start, request.computed[m])
        for g in self.sliding[m]:
            spec, table = self.groups[g], request.tables[g]
            drop = prefix.first_block(spec, start) - table.first // spec.block_tokens
            drop = min(drop, table.count // spec.block_tokens)
            if drop > 0:
                self.pool.drop(table.blocks[:drop])
                del table.blocks[:drop]
                table.first += drop * spec.block_tokens
                table.count -= drop * spec.block_tokens
                table.dirty = 0

    def ready(self, request: Request, m: int, rows: int) -> bool:
        """Whether `rows` more entries of model m have room already, in blocks that nobody else sees: the common case."""
        refs, keys = self.pool.refs, self.pool.keys
        ahead = request.planned[m] - request.computed[m]
        for g in self.by_model[m]:
            table, size = request.tables[g], self.groups[g].block_tokens
            at = table.count + ahead
            blocks, last = table.blocks, (at + rows - 1) // size
            if last >= len(blocks):
                return False
            for i in range(at // size, last + 1):
                if refs[blocks[i]] != 1 or keys[blocks[i]] is not None:
                    return False
        return True

    def need(self, request: Request, m: int, rows: int, *, park: bool = False, rewrite: bool = False) -> int:
        """Blocks that `rows` more entries of model m take, copies on write included.

        park: the rows stop between layers, and their hidden states need room too.  rewrite: compression may write over every
        entry that stands, so all shared blocks are copied, not only those that the rows touch.
        """
        total = 0
        for g in self._grown(m, park):
            size, table = self.groups[g].block_tokens, request.tables[g]
            start, stop = self._reach(request, m, g, rows, rewrite)
            total += max(0, -(-stop // size) - len(table.blocks))
            for b in table.blocks[start // size : -(-stop // size)]:
                total += self._others(b) > 0
        return total

    def grow(
        self, request: Request, m: int, rows: int, ops: list[KVOp], *, park: bool = False, rewrite: bool = False
    ) -> int:
        """Give the request room for `rows` more entries; the caller has asked `pool.can_take(rid, need(...))`.

        A block that another table holds is replaced, by a copy where it holds entries that stand.  One that only the index
        names is replaced while there is room, so that its prefix stays cached, and otherwise taken out of the index.  Returns
        blocks taken.
        """
        owed = self.need(request, m, rows, park=park, rewrite=rewrite)
        taken, spill = 0, None if self.tiers is None else self.tiers.spill(ops)
        for g in self._grown(m, park):
            size, table = self.groups[g].block_tokens, request.tables[g]
            start, stop = self._reach(request, m, g, rows, rewrite)
            standing = table.count + request.planned[m] - request.computed[m]
            copies: list[tuple[int, int]] = []
            for i in range(start // size, min(len(table.blocks), -(-stop // size))):
                old = table.blocks[i]
                if self._others(old):
                    owed -= 1
                elif (key := self.pool.keys[old]) is None:
                    continue
                elif not self.pool.can_take(request.rid, owed + 1):
                    self.pool.unpublish(old)
                    if spill is not None:
                        spill(old, key)
                    continue
                (table.blocks[i],) = self.pool.take(request.rid, 1, spill)
                taken += 1
                table.dirty = i if table.dirty is None else min(table.dirty, i)
                if i * size < standing:
                    copies.append((old, table.blocks[i]))
                    self._sources.append(old)
                else:
                    self.pool.drop([old])
            if copies:
                ops.append(KVOp(KVOpKind.COPY, g, tuple(a for a, _ in copies), tuple(b for _, b in copies)))
            more = -(-stop // size) - len(table.blocks)
            if more > 0:
                if table.dirty is None:
                    table.dirty = len(table.blocks)
                table.blocks.extend(self.pool.take(request.rid, more, spill))
                taken += more
                owed -= more
        return taken

    def submitted(self) -> None:
        """The plan in the making is made: let go of the sources of its copies (they rest until it has committed)."""
        if self._sources:
            self.pool.drop(self._sources)
            self._sources = []

    def lost(self, tickets: Iterable[int]) -> None:
        """Stored blocks that could not be saved or loaded, or of which nobody knows whether they were."""
        if self.tiers is not None:
            for ticket in tickets:
                self.tiers.forget(ticket)

    # ------------------------------------------------------------------ commit

    def advance(self, request: Request, m: int, entries: int, kept: dict[int, int]) -> None:
        """`entries` more stand in every group of model m, or as many as `kept` says in the groups that it names.

        A group that keeps fewer entries than positions ends publication: what follows is no longer a pure function of the tokens.
        """
        for g in self.by_model[m]:
            table = request.tables[g]
            table.count += entries
            if g not in kept or kept[g] == table.count:
                continue
            if not 0 <= kept[g] < table.count or self.groups[g].window is not None:
                raise InvariantError(
                    f"group {self.groups[g].name} of request {request.id} can't keep {kept[g]} of {table.count} entries"
                )
            table.count = kept[g]
            table.compressed = True
            request.publishes = False
            self.trim(table, self.groups[g].block_tokens)

    def publish(self, request: Request, m: int) -> None:
        """Offer the blocks that are full of committed entries to the index."""
        if not (self.share and request.publishes):
            return
        done = request.computed[m]
        for g in self.by_model[m]:
            spec, table = self.groups[g], request.tables[g]
            if done // spec.block_tokens <= table.published:
                continue  # as in nearly every step
            full, skipped = min(done, request.common) // spec.block_tokens, table.first // spec.block_tokens
            if full <= table.published:
                continue
            self._name(request, spec.block_tokens, full * spec.block_tokens)
            names = request.names[spec.block_tokens]
            for b in range(max(table.published, skipped), full):
                self.pool.publish(table.blocks[b - skipped], (g, names[b]))
            table.published = full

    def trim(self, table: Table, block_tokens: int) -> None:
        """Give back blocks beyond the entries that stand."""
        keep = -(-table.count // block_tokens)
        if keep < len(table.blocks):
            self.pool.drop(table.blocks[keep:])
            del table.blocks[keep:]
            table.dirty = keep if table.dirty is None else min(table.dirty, keep)

    def unpark(self, request: Request, m: int) -> None:
        """The parked hidden states of model m are no longer needed."""
        g = self.parked[m]
        if g is not None and request.tables[g].blocks:
            self.pool.drop(request.tables[g].blocks)
            request.tables[g] = Table()

    def release(self, request: Request) -> None:
        """The request loses all progress and all blocks."""
        self.pool.drop(request.forget())
        self.pool.reserve(request.rid, 0)

    def truncate(self, request: Request, m: int, length: int) -> bool:
        """Cut model m's entries to positions [0, length); False where a compressed or slid table can't tell them any more."""
        for g in self.by_model[m]:
            table = request.tables[g]
            first = prefix.first_block(self.groups[g], length) * self.groups[g].block_tokens
            if table.compressed or table.first > first:
                return False
        for g in self.by_model[m]:
            table, spec = request.tables[g], self.groups[g]
            table.count = max(0, min(table.count, length - table.first))
            table.published = min(table.published, length // spec.block_tokens)
            self.trim(table, spec.block_tokens)
        return True

    def fork(self, parent: Request, child: Request) -> bool:
        """Let the child share the parent's blocks as far as its context goes (its last row is computed anew).

        False, and nothing changed, where the parent's tables do not hold what the child needs.
        """
        if parent.partial is not None or (parent.stack.stateful and not parent.started):
            return False  # its tables change between the layers, or the executor has nothing that could be inherited
        lengths = [min(computed, child.ends(len(child.context) - 1)) for computed in parent.computed]
        for m, groups in enumerate(self.by_model):
            for g in groups:
                spec, source = self.groups[g], parent.tables[g]
                lost = source.compressed and lengths[m] < parent.computed[m]
                if lost or source.first > prefix.first_block(spec, lengths[m]) * spec.block_tokens:
                    return False
        child.publishes = parent.publishes
        for m, groups in enumerate(self.by_model):
            for g in groups:
                spec, source, table = self.groups[g], parent.tables[g], Table()
                table.first, table.compressed = source.first, source.compressed
                table.count = source.count if source.compressed else lengths[m] - source.first
                table.blocks = source.blocks[: -(-table.count // spec.block_tokens)]
                table.published = min(source.published, lengths[m] // spec.block_tokens)
                table.dirty = 0
                for b in table.blocks:
                    self.pool.hold(b)
                child.tables[g] = table
            child.computed[m] = child.planned[m] = lengths[m]
        return True

    # ------------------------------------------------------------------ proof

    def check(self, requests: Iterable[Request]) -> None:
        """All tables against the pool, and every physical length against its blocks.  Raises InvariantError."""
        requests = list(requests)
        self.pool.check([t.blocks for r in requests for t in r.tables])
        if self.tiers is not None:
            self.tiers.check()
        for r in requests:
            if r.state in (State.WAITING, State.DONE) and any(t.blocks for t in r.tables):
                raise InvariantError(f"request {r.id}.{r.index} is {r.state.value} but holds blocks")
            if r.loading and not r.in_flight:
                raise InvariantError(f"request {r.id}.{r.index} waits for blocks that no plan in flight loads")
            for m, groups in enumerate(self.by_model):
                if not 0 <= r.computed[m] <= r.planned[m]:
                    raise InvariantError(f"request {r.id}.{r.index}: computed {r.computed[m]}, planned {r.planned[m]}")
                for g in groups:
                    t, bt = r.tables[g], self.groups[g].block_tokens
                    if t.count > len(t.blocks) * bt or t.count < 0:
                        raise InvariantError(
                            f"request {r.id}.{r.index}: {t.count} entries in {len(t.blocks)} blocks of {bt}"
                        )
                    if t.first + t.count > r.computed[m] or (t.first + t.count < r.computed[m] and not t.compressed):
                        raise InvariantError(
                            f"request {r.id}.{r.index}: {t.first}+{t.count} entries, computed {r.computed[m]}"
                        )
                    if t.compressed and r.publishes:
                        raise InvariantError(f"request {r.id}.{r.index} is compressed and still publishes")
            for parked in self.parked:
                if parked is not None and r.partial is None and r.tables[parked].blocks:
                    raise InvariantError(f"request {r.id}.{r.index} holds parked hidden states of no rows")

    # ------------------------------------------------------------------ inside

    def _grown(self, m: int, park: bool) -> list[int]:
        g = self.parked[m]
        return [*self.by_model[m], g] if park and g is not None else self.by_model[m]

    def _reach(self, request: Request, m: int, g: int, rows: int, rewrite: bool) -> tuple[int, int]:
        """Entries [start, stop) of group g that planning `rows` more of model m may write."""
        if g == self.parked[m]:
            return 0, rows
        at = request.tables[g].count + request.planned[m] - request.computed[m]
        return 0 if rewrite and self.groups[g].window is None else at, at + rows

    def _others(self, block: int) -> int:
        """References to a held block beyond one table's own and those of copies in the making."""
        return self.pool.refs[block] - 1 - (self._sources.count(block) if self._sources else 0)

    def names(self, request: Request, block_tokens: int, blocks: int) -> list[bytes]:
        """Of the first so many full blocks of its context."""
        self._name(request, block_tokens, blocks * block_tokens)
        return request.names[block_tokens][:blocks]

    def _name(self, request: Request, block_tokens: int, upto: int) -> None:
        names = request.names.setdefault(block_tokens, [])
        if (len(names) + 1) * block_tokens <= upto:
            salt = request.spec.salt, request.settings
            base = self._roots.get(salt)
            if base is None:
                if len(self._roots) >= 4096:
                    self._roots.clear()
                base = self._roots[salt] = prefix.root(salt[0], self.settings + b"\0" + salt[1])
            prefix.extend(names, base, request.context, request.spans, block_tokens, upto)
