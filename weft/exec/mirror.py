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

    def places(self, works: Sequence[Work], g: int, counts: Ints) -> tuple[Ints, Ints, Ints]:
        """Where works lie in group g: their tables [S, B], 0 beyond each one's end; entries [S] that stand once counts[i] rows of
        each are written; and for each of those rows block * block_tokens + offset.
        """
        sequences, size = [self.sequences[work.request] for work in works], self.groups[g].block_tokens
        used = [s.used[g] for s in sequences]
        tables = np.zeros((len(works), max(used)), np.int64)
        for row, (s, blocks) in enumerate(zip(sequences, used, strict=True)):
            tables[row, :blocks] = s.tables[g][:blocks]
        at = np.array([self.entry(work, g) for work in works])
        lengths = at + counts
        if (at < 0).any() or (lengths > np.array(used) * size).any():
            i = int(np.argmax((at < 0) | (lengths > np.array(used) * size)))
            raise InvariantError(
                f"sequence {works[i].request}: entries {at[i]} to {lengths[i] - 1} are outside its {used[i]} blocks"
            )
        owners, within = flattened(counts)
        entries = at[owners] + within
        slots: Ints = tables[owners, entries // size] * size + entries % size
        return tables, lengths, slots

    def slots(self, work: Work, g: int, ahead: int = 0) -> Ints:
        """Where the work's rows are written in group g, and `ahead` more behind them."""
        return self.places([work], g, np.array([len(work.tokens) + ahead]))[2]


def flattened(counts: Ints) -> tuple[Ints, Ints]:
    """Of rows that lie one after the other, counts[i] of each i: whose a row is, and its number among those."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners, np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]
