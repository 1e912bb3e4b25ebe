"""Block tables of requests over the pool: prefix hits, growth, sliding windows, copy on write, publication.

The only place where tables change.  Legend: `m` model index; a table's *physical* index counts entries from its head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from weft.core import prefix
from weft.core.pool import BlockPool
from weft.core.request import Request, State, Table
from weft.errors import InvariantError
from weft.types import GroupKind, GroupSpec, KVOp, KVOpKind


class KV:
    """groups: of all models; models: their names, the target first.  share: whether prefixes are shared at all."""

    def __init__(
        self,
        groups: Sequence[GroupSpec],
        pool: BlockPool,
        models: Sequence[str] = ("target",),
        *,
        settings: bytes = b"",
        share: bool = True,
        history: int = 0,
    ) -> None:
        self.groups = list(groups)
        self.pool = pool
        self.settings = settings
        self.share = share
        self.history = history
        self.by_model: list[list[int]] = [
            [g for g, spec in enumerate(groups) if spec.model == name and spec.kind is not GroupKind.PARKED] for name in models
        ]
        self.parked: list[int | None] = [
            next((g for g, s in enumerate(groups) if s.model == name and s.kind is GroupKind.PARKED), None) for name in models
        ]
        self._roots: dict[bytes, bytes] = {}
        for m, name in enumerate(models):
            if not self.by_model[m]:
                raise InvariantError(f"model {name} has no KV group")

    # ------------------------------------------------------------------ prefix hits

    def match(self, request: Request) -> tuple[list[int], list[dict[int, list[int]]], int]:
        """(tokens, tables) that the index offers for each model, and how many of the blocks nobody holds now.

        Changes nothing but the request's memo of names.
        """
        lengths, tables, idle = [], [], 0
        cap = self.hit_cap(request)
        for groups in self.by_model:
            length, found = 0, dict[int, list[int]]()
            if cap > 0:
                specs = [(g, self.groups[g]) for g in groups]
                for _, spec in specs:
                    self._name(request, spec.block_tokens, cap)
                length, found = prefix.longest_hit(specs, request.names, self.pool.lookup, cap)
            lengths.append(length)
            tables.append(found)
            idle += sum(self.pool.refs[b] == 0 for blocks in found.values() for b in blocks)
        return lengths, tables, idle

    def hit_cap(self, request: Request) -> int:
        """Tokens that may come from the index: the last one is always computed, for its logits."""
        if not (self.share and request.publishes) or (request.sampling.prompt_logprobs >= 0 and request.reported == 0):
            return 0
        return min(len(request.context) - 1, len(request.context) - self.history)

    def adopt(self, request: Request, lengths: list[int], tables: list[dict[int, list[int]]]) -> None:
        """Make a match the request's own: one more reference to each block."""
        for m, found in enumerate(tables):
            for g, blocks in found.items():
                for b in blocks:
                    self.pool.hold(b)
                table, spec = request.tables[g], self.groups[g]
                table.blocks = list(blocks)
                table.first = prefix.first_block(spec, lengths[m]) * spec.block_tokens
                table.count = lengths[m] - table.first
                table.published = lengths[m] // spec.block_tokens
                table.dirty = 0
            request.computed[m] = request.planned[m] = lengths[m]

    # ------------------------------------------------------------------ growth

    def slide(self, request: Request, m: int, start: int) -> None:
        """Drop the head blocks that no query from position `start` on can see."""
        for g in self.by_model[m]:
            spec, table = self.groups[g], request.tables[g]
            if spec.window is None or not request.publishes:
                continue
            drop = prefix.first_block(spec, start) - table.first // spec.block_tokens
            drop = min(drop, table.count // spec.block_tokens)
            if drop > 0:
                self.pool.drop(table.blocks[:drop])
                del table.blocks[:drop]
                table.first += drop * spec.block_tokens
                table.count -= drop * spec.block_tokens
                table.dirty = 0

    def need(self, request: Request, m: int, rows: int, *, park: bool = False) -> int:
        """Blocks that `rows` more entries of model m take, copies on write included."""
        total = 0
        for g in self._grown(m, park):
            spec, table = self.groups[g], request.tables[g]
            at = self._physical(request, m, table)
            total += max(0, -(-(at + rows) // spec.block_tokens) - len(table.blocks))
            total += sum(1 for _ in self._shared(table, at, at + rows, spec.block_tokens))
        return total

    def grow(self, request: Request, m: int, rows: int, ops: list[KVOp], *, park: bool = False) -> int:
        """Give the request room for `rows` more entries; the caller has asked `pool.can_take(rid, need(...))`.

        Shared blocks that would be written are replaced: by a copy where they hold entries that stand.  Returns blocks taken.
        """
        taken = 0
        for g in self._grown(m, park):
            spec, table = self.groups[g], request.tables[g]
            at = self._physical(request, m, table)
            for i in list(self._shared(table, at, at + rows, spec.block_tokens)):
                old, (new,) = table.blocks[i], self.pool.take(request.rid, 1)
                if i * spec.block_tokens < at:
                    ops.append(KVOp(KVOpKind.COPY, g, (old,), (new,)))
                table.blocks[i] = new
                table.dirty = i if table.dirty is None else min(table.dirty, i)
                self.pool.drop([old])
                taken += 1
            more = -(-(at + rows) // spec.block_tokens) - len(table.blocks)
            if more > 0:
                if table.dirty is None:
                    table.dirty = len(table.blocks)
                table.blocks.extend(self.pool.take(request.rid, more))
                taken += more
        return taken

    # ------------------------------------------------------------------ commit

    def advance(self, request: Request, m: int, entries: int, kept: dict[int, int]) -> None:
        """`entries` more stand in every group of model m, or as many as `kept` says in the groups that it names.

        A group that keeps fewer entries than positions ends publication: what follows is no longer a pure function of the tokens.
        """
        for g in self.by_model[m]:
            table = request.tables[g]
            table.count += entries
            if g in kept:
                if not 0 <= kept[g] <= table.count:
                    raise InvariantError(f"group {g} of request {request.id} cannot keep {kept[g]} of {table.count} entries")
                if kept[g] < table.count:
                    table.count = kept[g]
                    request.publishes = False
                    self.trim(table, self.groups[g].block_tokens)

    def publish(self, request: Request, m: int) -> None:
        """Offer the blocks that are full of committed entries to the index."""
        if not (self.share and request.publishes):
            return
        done = min(request.computed[m], len(request.context))
        for g in self.by_model[m]:
            spec, table = self.groups[g], request.tables[g]
            full, skipped = done // spec.block_tokens, table.first // spec.block_tokens
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
            if table.dirty is not None:
                table.dirty = min(table.dirty, keep)

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
        """Cut model m's entries to positions [0, length); False where a window no longer reaches back that far."""
        for g in self.by_model[m]:
            table = request.tables[g]
            first = prefix.first_block(self.groups[g], length) * self.groups[g].block_tokens
            if not request.publishes or table.first > first:
                return False
        for g in self.by_model[m]:
            table, spec = request.tables[g], self.groups[g]
            table.count = max(0, min(table.count, length - table.first))
            table.published = min(table.published, length // spec.block_tokens)
            self.trim(table, spec.block_tokens)
        return True

    def fork(self, parent: Request, child: Request) -> bool:
        """Let the child share the parent's blocks as far as its context goes (its last row is computed anew)."""
        child.publishes = parent.publishes
        keep = len(child.context) - 1
        for m, groups in enumerate(self.by_model):
            length = min(parent.computed[m], keep)
            if not parent.publishes and length < parent.computed[m]:
                return False
            for g in groups:
                if parent.tables[g].first > prefix.first_block(self.groups[g], length) * self.groups[g].block_tokens:
                    return False
        for m, groups in enumerate(self.by_model):
            length = min(parent.computed[m], keep)
            for g in groups:
                spec, source = self.groups[g], parent.tables[g]
                table = Table()
                table.first = source.first
                table.count = length - source.first if parent.publishes else source.count
                table.blocks = source.blocks[: -(-table.count // spec.block_tokens)]
                table.published = min(source.published, length // spec.block_tokens)
                table.dirty = 0
                for b in table.blocks:
                    self.pool.hold(b)
                child.tables[g] = table
            child.computed[m] = child.planned[m] = length
        return True

    # ------------------------------------------------------------------ proof

    def check(self, requests: Iterable[Request]) -> None:
        """All tables against the pool, and every physical length against its blocks.  Raises InvariantError."""
        requests = list(requests)
        self.pool.check([t.blocks for r in requests for t in r.tables])
        for r in requests:
            if r.state in (State.WAITING, State.DONE) and any(t.blocks for t in r.tables):
                raise InvariantError(f"request {r.id}.{r.index} is {r.state.value} but holds blocks")
            for m, groups in enumerate(self.by_model):
                if not 0 <= r.computed[m] <= r.planned[m]:
                    raise InvariantError(f"request {r.id}.{r.index}: computed {r.computed[m]}, planned {r.planned[m]}")
                for g in groups:
                    t, bt = r.tables[g], self.groups[g].block_tokens
                    if t.count > len(t.blocks) * bt or t.count < 0:
                        raise InvariantError(f"request {r.id}.{r.index}: {t.count} entries in {len(t.blocks)} blocks of {bt}")
                    if r.publishes and r.state is State.RUNNING and t.first + t.count != r.computed[m]:
                        raise InvariantError(f"request {r.id}.{r.index}: {t.first}+{t.count} entries, computed {r.computed[m]}")

    # ------------------------------------------------------------------ inside

    def _grown(self, m: int, park: bool) -> list[int]:
        g = self.parked[m]
        return [*self.by_model[m], g] if park and g is not None else self.by_model[m]

    def _physical(self, request: Request, m: int, table: Table) -> int:
        return table.count + request.planned[m] - request.computed[m]

    def _shared(self, table: Table, start: int, stop: int, block_tokens: int) -> Iterable[int]:
        """Indices of standing blocks that writing entries [start, stop) would change under somebody else's eyes."""
        for i in range(start // block_tokens, min(len(table.blocks), -(-stop // block_tokens))):
            b = table.blocks[i]
            if self.pool.refs[b] > 1 or self.pool.keys[b] is not None:
                yield i

    def _name(self, request: Request, block_tokens: int, upto: int) -> None:
        names = request.names.setdefault(block_tokens, [])
        if (len(names) + 1) * block_tokens <= upto:
            salt = request.spec.salt
            base = self._roots.get(salt)
            if base is None:
                if len(self._roots) >= 4096:
                    self._roots.clear()
                base = self._roots[salt] = prefix.root(salt, self.settings)
            prefix.extend(names, base, request.context, request.spans, block_tokens, upto)
