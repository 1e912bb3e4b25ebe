"""What an executor knows of the sequences it serves: tokens and block tables, kept up to date from the plans alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from weft.config import Stack, Stacks, build_stack
from weft.errors import InvariantError
from weft.types import Enter, GroupKind, GroupSpec, Plan, SamplingSpec, Span, VectorItem, Work

Ints = npt.NDArray[np.int64]


class Mirrored:
    """One sequence.  tokens: ids by position, valid as far as works have said.  tables[g]: block ids; first[g]: entries dropped
    at the head; count[g]: entries standing where they are fewer than positions (compressed), else -1.
    """

    __slots__ = (
        "count",
        "first",
        "forced",
        "fresh",
        "given",
        "grammar",
        "grants",
        "laws",
        "prompt",
        "request",
        "salt",
        "sampling",
        "seed",
        "spans",
        "stack",
        "stale",
        "state",
        "tables",
        "tokens",
        "used",
        "vectors",
    )

    def __init__(self, enter: Enter, groups: int, stack: Stack) -> None:
        self.request = enter.request
        self.stack = stack
        self.forced = enter.forced
        self.grammar = enter.grammar
        self.given = enter.given
        self.salt = enter.salt
        self.stale: tuple[int, ...] = ()
        """What the target drew in the last step behind the first guess that did not stand."""
        self.laws: Any = None
        """Where the newest guesses were drawn from, by the technique that made them."""
        self.tokens: Ints = np.empty(max(64, 2 * len(enter.tokens)), np.int64)
        self.tokens[: len(enter.tokens)] = enter.tokens
        self.prompt = enter.prompt
        self.sampling: SamplingSpec = enter.sampling
        self.seed = enter.seed
        self.spans: tuple[Span, ...] = enter.spans
        self.vectors: dict[int, VectorItem] = enter.vectors
        self.tables: list[Ints] = [np.empty(16, np.int64) for _ in range(groups)]
        self.used = [0] * groups
        self.first = [0] * groups
        self.count = [-1] * groups
        self.grants = 0
        """How often blocks were granted: who keeps a copy of a table sees by it whether it is old."""
        self.fresh: dict[int, int] = {}
        """Entries by group on entering, until the first work tells whether they are all of its positions."""
        self.state: dict[str, object] = {}
        """Per-request state of executors and techniques, by owner.  What has a method `fork` gives a copy of itself to a fork."""

    def table(self, g: int) -> Ints:
        return self.tables[g][: self.used[g]]

    def output(self, length: int) -> Ints:
        """Ids of the output among the first `length` positions: what follows the prompt and is no program's own word."""
        if not self.given:
            return self.tokens[self.prompt : length]
        own = np.ones(length, bool)
        own[: self.prompt] = False
        for start, stop in self.given:
            own[start:stop] = False
        return self.tokens[:length][own]

    def write(self, start: int, ids: Sequence[int]) -> None:
        """Set tokens [start, start + len(ids))."""
        stop = start + len(ids)
        if stop > len(self.tokens):
            grown = np.empty(2 * stop, np.int64)
            grown[: len(self.tokens)] = self.tokens
            self.tokens = grown
        if len(ids) == 1:  # as in nearly every step; a slice takes five times as long
            self.tokens[start] = ids[0]
        else:
            self.tokens[start:stop] = ids


class Plain:
    """A sequence on a model beside the target.  The techniques of its stack belong to the target: here it has the nulls alone."""

    __slots__ = ("stack", "state")

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.state: dict[str, object] = {}


class Mirror:
    """Follow a stream of plans.  Raises InvariantError where a plan does not continue what was said before."""

    def __init__(self, groups: Sequence[GroupSpec], stacks: Stacks | None = None) -> None:
        self.groups = list(groups)
        self.stacks = stacks or Stacks(build_stack())
        self.sequences: dict[int, Mirrored] = {}
        self.plain = Plain(build_stack())
        self._whole = [g for g, s in enumerate(groups) if s.window is None and s.kind is not GroupKind.PARKED]

    def follow(self, plan: Plan) -> None:
        """Leave, enter, grants and the works' tokens, in that order."""
        sources = {e.source: self.sequences.get(e.source) for e in plan.enter if e.source >= 0}
        for rid in plan.leave:
            self.sequences.pop(rid, None)
        for enter in plan.enter:
            if enter.request in self.sequences:
                raise InvariantError(f"sequence {enter.request} enters twice")
            s = Mirrored(enter, len(self.groups), self.stacks.of(enter.techniques))
            self.sequences[enter.request] = s
            source = sources.get(enter.source)
            if source is not None:
                s.state = {owner: x.fork() for owner, x in source.state.items() if hasattr(x, "fork")}
            s.fresh = {g: n for g, n in enumerate(enter.entries) if g in self._whole}
        for grant in plan.grants:
            s, g = self.sequences[grant.request], grant.group
            stop = grant.at + len(grant.blocks)
            if grant.at > s.used[g]:
                raise InvariantError(
                    f"sequence {grant.request}: a grant at {grant.at} leaves a hole after {s.used[g]} blocks"
                )
            if stop > len(s.tables[g]):
                grown = np.empty(2 * stop, np.int64)
                grown[: s.used[g]] = s.table(g)
                s.tables[g] = grown
            s.tables[g][grant.at : stop] = grant.blocks
            s.used[g], s.first[g] = stop, grant.first
            s.grants += 1
        for work in plan.works:
            s = self.sequences[work.request]
            s.write(work.start, work.tokens)
            if s.fresh:
                self._meet(s, work)

    def _meet(self, s: Mirrored, work: Work) -> None:
        """A table that entered with fewer entries than positions came from a compressed sequence (windows never do)."""
        for g in [g for g in s.fresh if self.groups[g].model == work.model]:
            entries = s.fresh.pop(g)
            if entries != work.start:
                s.count[g] = entries

    def reading(self, works: Sequence[Work], blocks: Collection[int]) -> set[int]:
        """Works, by index, of sequences whose tables name one of these blocks, and of those sampled together with them."""
        if not blocks:
            return set()
        bad = list(blocks)
        found = {
            i for i, work in enumerate(works)
            if any(np.isin(self.sequences[work.request].table(g), bad).any() for g in range(len(self.groups)))
        }  # fmt: skip
        links = {works[i].link for i in found} - {None}
        return found | {i for i, work in enumerate(works) if work.link in links}

    def entry(self, work: Work, g: int) -> int:
        """Physical index, counted from the table's head, at which the work's first row is written in group g."""
        s = self.sequences[work.request]
        return work.start - s.first[g] if s.count[g] < 0 else s.count[g]

    def slots(self, work: Work, g: int, ahead: int = 0) -> list[int]:
        """Where the work's rows are written in group g: block * block_tokens + offset, one for each row, and `ahead` more."""
        s, size = self.sequences[work.request], self.groups[g].block_tokens
        at, table = self.entry(work, g), s.tables[g]
        stop = at + len(work.tokens) + ahead
        if at < 0 or stop > s.used[g] * size:
            raise InvariantError(
                f"sequence {work.request}: entries {at} to {stop - 1} are outside its {s.used[g]} blocks"
            )
        # One row, as in nearly every step: behind a pass an operation on arrays takes as long as ten of these.
        if stop == at + 1:
            return [int(table[at // size]) * size + at % size]
        entries = np.arange(at, stop)
        found: list[int] = (table[entries // size] * size + entries % size).tolist()
        return found
