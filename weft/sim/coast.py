"""Runs of steps in which nothing is decided: everybody decodes, nobody waits who could enter, and there is room.

Such a step advances each sequence by one row.  What it does beyond that (a block more, a full block published, an answer that
ends) happens at steps that are known beforehand, so only those sequences are touched, and the others are told when they next
matter.  The pool, the prefix index and the order of everything are as if the engine had made each plan: `tests/sim` compares the
logs of both.

A schedule says by `steady = True` that with nothing but decodes running it gives each its row, in an order that stays, and that
who may not enter then may not enter a step later either, unless somebody ends.
"""

from __future__ import annotations

from collections.abc import Callable

from weft.core.engine import Engine
from weft.core.request import Request, State
from weft.sim.executor import OUTPUT
from weft.sim.gaps import Gaps
from weft.slots.cost import Load, Parts, Price
from weft.types import Event, Grant, GroupKind, KVOp

Step = Callable[[float, float, Parts, float, int], None]
"""Told of a step: when it began and ended, its parts, its rows, and how many sequences ran."""


class Coast:
    """price: of the engine's steps.  kinds: of the model's layers.  told, ended: of steps, and of answers that end.

    gaps: told how far tokens are apart.  log: entries of the decision log, or None.
    """

    def __init__(
        self, engine: Engine, price: Price, kinds: int, told: Step, ended: Callable[[list[Event], float], None],
        gaps: Gaps, log: list[tuple[object, ...]] | None = None,
    ) -> None:  # fmt: skip
        self.engine, self.price, self.told, self.ended, self.gaps, self.log = engine, price, told, ended, gaps, log
        self.scheduler, self.kv, self.pool = engine.scheduler, engine.kv, engine.pool
        groups = [g for g in engine.kv.groups if g.kind is not GroupKind.PARKED]
        self.possible = (
            bool(getattr(engine.scheduler.policy, "steady", False))
            and len(groups) == 1
            and groups[0].window is None
            and len(engine.models) == 1
            and engine.kv.tiers is None
            and engine.most_in_flight == 1
            and not engine.limits.work_bytes
            and kinds == 1
        )
        self.group = engine.kv.by_model[0][0]
        self.size = engine.kv.groups[self.group].block_tokens
        self.load = Load(prompt_pairs=[0.0] * kinds, prompt_entries=[0.0] * kinds, decode_entries=[0.0] * kinds)
        self.at = -1
        """Steps coasted since `begin`; -1 while the engine plans itself."""
        self.due: tuple[Parts, float] | None = None
        """What the step in hand takes and when it ends, where `run` was last told not to wait for that."""
        self.steps = 0

    # ------------------------------------------------------------------ beginning and ending

    @property
    def active(self) -> bool:
        return self.at >= 0

    def begin(self, now: float) -> bool:
        """Take over from the engine, if nothing will be decided in its next step.  Changes nothing otherwise."""
        s, limits = self.scheduler, self.engine.limits
        running = s.running
        if not self.possible or not running or len(running) > min(limits.max_rows, limits.max_samples):
            return False
        if s.parked or s.links or s.forked or self._enters(now):
            return False
        for r in running.values():
            if not self._plain(r):
                return False
        at_edge = sum(
            len(r.tables[self.group].blocks) * self.size == r.tables[self.group].count for r in running.values()
        )
        if at_edge > self.pool.available:
            return False
        order = s.policy.order
        self.requests = [r for _, _, r in sorted((order(r, now), r.rid, r) for r in running.values())]
        self.base = [0] * len(self.requests)
        self.grows: dict[int, list[int]] = {}
        self.fills: dict[int, list[int]] = {}
        self.ends: dict[int, list[int]] = {}
        entries = 0
        for i, r in enumerate(self.requests):
            table, count, sampling = r.tables[self.group], r.tables[self.group].count, r.sampling
            entries += count + 1
            self.grows.setdefault(len(table.blocks) * self.size - count, []).append(i)
            left = min(sampling.max_tokens - len(r.output), limits.max_model_len - len(r.context))
            self.ends.setdefault(left - 1, []).append(i)
            if self._publishes(r):
                self.fills.setdefault(self.size - 1 - count % self.size, []).append(i)
        self.alive, self.entries, self.at = len(self.requests), entries, 0
        self.longest, self.ended_s = 0.0, now  # of the gaps since the first step, and when the last step ended
        return True

    def _enters(self, now: float) -> bool:
        """Whether somebody who waits could enter now, or be refused one day."""
        head = self.scheduler.queue.first(now)
        if head is None:
            return False
        if self.engine.lateness is not None:
            return True
        return head.link is not None or self.scheduler.entry(head, self.scheduler.view(now)) is not None

    def _publishes(self, r: Request) -> bool:
        return self.kv.share and r.publishes and r.tile == 1 and r.stack.shares_output

    def _plain(self, r: Request) -> bool:
        """Whether the request is one that decodes, with nothing to be told of it and the last of its blocks its own."""
        table = r.tables[self.group]
        at = table.count // self.size
        refs, keys = self.pool.refs, self.pool.keys
        return (
            r.decoding
            and r.started
            and not (r.draft or r.in_flight or r.loading or r.companions or r.leader or r.sampling.stop_ids)
            and r.partial is None
            and r.cut is None
            and r.link is None
            and r.fanned
            and table.dirty is None
            and not table.compressed
            and r.sampling.prompt_logprobs < 0
            and r.id not in self.engine.programs
            and (table.published == at or not self._publishes(r))
            and all(refs[b] == 1 and keys[b] is None for b in table.blocks[at:])
        )

    def stop(self) -> None:
        """Hand back to the engine: every sequence stands where the steps so far have brought it."""
        if self.at < 0:
            return
        for i, r in enumerate(self.requests):
            if r.state is not State.DONE:
                self._sync(i, self.at)
                if self.at:
                    self.gaps.until(r.id, self.ended_s, self.longest)
        self.at, self.due = -1, None

    def _sync(self, i: int, at: int) -> None:
        """Bring one sequence to where `at` steps have brought it."""
        n = at - self.base[i]
        if n:
            r = self.requests[i]
            told = [OUTPUT + r.rid] * n
            r.context += told
            r.output += told
            r.computed[0] += n
            r.planned[0] += n
            r.tables[self.group].count += n
            self.base[i] = at

    def further(self, size: int) -> int:
        """Blocks that the sequences fill beyond what they have been told."""
        if self.at < 0:
            return 0
        live = [(i, r) for i, r in enumerate(self.requests) if r.state is not State.DONE]
        told = [(r.computed[0], r.computed[0] + self.at - self.base[i]) for i, r in live]
        return sum(-(-after // size) + before // -size for before, after in told)

    # ------------------------------------------------------------------ steps

    def run(self, now: float, before: float, until: float) -> float:
        """Steps that begin before `before` and end by `until`; returns when the last one ended.

        Stops coasting where a decision is due.
        """
        engine, pool, load, price, told = self.engine, self.pool, self.load, self.price, self.told
        while self.at >= 0 and now < before:
            at, alive = self.at, self.alive
            grow = self._live(self.grows, at) if at in self.grows else []
            if self.due is not None:
                parts, end = self.due
                self.due = None
            else:
                if grow and pool.available < len(grow):
                    self.stop()
                    break
                load.rows = load.samples = load.works = load.decode_rows = alive
                load.decode_entries[0] = self.entries
                parts = price(load)
                end = now + sum(parts)
            if end > until:
                self.due = parts, end
                break
            engine._step += 1
            leave, self.scheduler.leaving = self.scheduler.leaving, []
            pool.now = now
            grants = self._grow(grow, at) if grow else []
            if self.log is not None:
                self._note(now, at, leave, grants)
            pool.now = end
            self.at = at + 1
            self.steps += 1
            self.entries += alive
            engine._generated += alive
            engine._rows = alive
            told(now, end, parts, alive, alive)
            self._spoke(now, end)
            if at in self.fills or at in self.ends:
                self._settle(self._live(self.fills, at), self._live(self.ends, at), end)
            now = end
        return now

    def _spoke(self, now: float, end: float) -> None:
        """Everybody has said a token.  In the first step each comes as long after the one before as that happened to be ago."""
        if self.at == 1:
            for r in self.requests:
                self.gaps.said(r.id, end)
        else:
            self.gaps.count(end - now, self.alive)
            self.longest = max(self.longest, end - now)
        self.ended_s = end

    def _live(self, calendar: dict[int, list[int]], at: int) -> list[int]:
        """Who is due at a step and still there, in the order of the schedule; the calendar keeps the list."""
        due = calendar.get(at)
        if due is None:
            return []
        calendar[at] = due = sorted(i for i in due if self.requests[i].state is not State.DONE)
        return due

    def _grow(self, grow: list[int], at: int) -> list[Grant]:
        """A block more for each; what the executor would be told."""
        ops: list[KVOp] = []
        grants = []
        for i in grow:
            self._sync(i, at)
            r = self.requests[i]
            self.kv.grow(r, 0, 1, ops)
            table = r.tables[self.group]
            assert table.dirty is not None
            grants.append(Grant(r.rid, self.group, table.dirty, tuple(table.blocks[table.dirty :]), table.first))
            table.dirty = None
        self.grows.setdefault(at + self.size, []).extend(grow)
        del self.grows[at]
        return grants

    def _settle(self, fill: list[int], ends: list[int], now: float) -> None:
        """What a step's commit does beyond counting: full blocks become visible, answers end."""
        engine, at, step = self.engine, self.at, self.engine._step
        self.ends.pop(at - 1, None)
        if self.fills.pop(at - 1, None):
            self.fills.setdefault(at - 1 + self.size, []).extend(fill)
        if not ends:
            for i in fill:
                self._sync(i, at)
                self.kv.publish(self.requests[i], 0)
            return
        engine.pool.submitted(step)
        gone, events = set(ends), list[Event]()
        for i in sorted(gone.union(fill)):
            r = self.requests[i]
            self._sync(i, at)
            if i in gone:
                self.alive -= 1
                self.gaps.until(r.id, now, self.longest)
                self.entries -= r.tables[self.group].count + 1
                engine._end(r, "length", events)
            else:
                self.kv.publish(r, 0)
        engine.pool.committed(step)
        self.ended(events, now)
        if not self.alive or self._enters(now):
            self.stop()

    def _note(self, now: float, at: int, leave: list[int], grants: list[Grant]) -> None:
        assert self.log is not None
        works = tuple(
            (r.rid, len(r.context) - 1 + at - self.base[i], 1)
            for i, r in enumerate(self.requests) if r.state is not State.DONE
        )  # fmt: skip
        self.log.append((self.engine._step, now, works, (), tuple(leave), tuple(grants), (), (), ()))
