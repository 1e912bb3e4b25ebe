"""The scheduler: one loop over running and waiting requests that fills a step's budget of rows, samples, blocks and bytes.

There are no phases.  A request has context and a planned length; a step says how far each goes.  Chunks, prefix hits, drafts to verify,
resumed and layer-split requests all pass through `_advance`.  The order, the admission, the quota and the victim are the
policy's; that nobody is lost is the loop's: the oldest request is never a victim, and a request that fits alone always ends.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from weft.config import Limits
from weft.core.kv import KV
from weft.core.ledger import blocks_for
from weft.core.request import Request, State
from weft.slots import Schedule, StepView
from weft.types import Enter, Grant, Keep, KVOp, Mask, Plan, Work


@dataclass(slots=True)
class Draft:
    """A plan while it is made."""

    view: StepView
    samples_left: int
    bytes_left: float
    works: list[Work] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    ops: list[KVOp] = field(default_factory=list)
    planned: set[int] = field(default_factory=set)
    preempted: list[Request] = field(default_factory=list)
    closed: bool = False
    """Nobody is admitted any more in this step."""
    blocks: int = 0
    samples: int = 0


class Scheduler:
    """Owns who is running, who waits, and in which order.  models: names; layers: layer count of the target model."""

    def __init__(self, kv: KV, policy: Schedule, limits: Limits, models: tuple[str, ...], layers: int) -> None:
        self.kv, self.pool, self.policy, self.limits = kv, kv.pool, policy, limits
        self.models, self.layers = models, layers
        self.running: dict[int, Request] = {}
        self.parked: dict[int, Request] = {}
        self.waiting: dict[int, Request] = {}
        self.leaving: list[int] = []
        self.preemptions = 0
        self.hit_tokens = 0
        self.queried_tokens = 0
        self._heap: list[tuple[tuple[float, ...], int, int, Request]] = []

    # ------------------------------------------------------------------ the queue

    def enqueue(self, request: Request, now: float) -> None:
        request.state = State.WAITING
        self.waiting[request.rid] = request
        request.key = self.policy.order(request, now)
        heapq.heappush(self._heap, (request.key, request.rid, request.generation, request))

    def remove(self, request: Request) -> None:
        """Out of every list, without its blocks."""
        if request.state is not State.DONE:
            if request.started:
                self.leaving.append(request.rid)
            self.kv.release(request)
        for group in (self.running, self.parked, self.waiting):
            group.pop(request.rid, None)
        request.state = State.DONE

    def footprint(self, request: Request) -> int:
        """Blocks that the request holds at most, alone, in all its models."""
        tokens = min(request.limit, self.limits.max_model_len) + self.limits.max_guesses
        return blocks_for(self.kv.groups, tokens, self.limits.max_rows, layered=self.policy.layered)

    def _head(self) -> Request | None:
        while self._heap:
            _, rid, generation, request = self._heap[0]
            if self.waiting.get(rid) is request and request.generation == generation:
                return request
            heapq.heappop(self._heap)
        return None

    # ------------------------------------------------------------------ one step

    def plan(self, now: float, step: int) -> tuple[Plan, list[Request], list[Request]]:
        """(plan, the request of each work, those preempted on the way)."""
        self.pool.now = now
        if not self.policy.static:
            self._reorder(now)
        view = StepView(now, self.limits.max_rows, self.layers, len(self.running), len(self.waiting))
        view.free_blocks = self.pool.available
        d = Draft(view, self.limits.max_samples, float(self.limits.work_bytes or "inf"))
        for request, waits in self._candidates(now, d):
            if view.rows_left <= 0:
                break
            if waits and not self._admit(request, d):
                d.closed = True
            if request.state is State.RUNNING and request.rid not in d.planned:
                self._advance(request, d)
        for request in d.preempted:
            self.enqueue(request, now)
        return self._finish(d, step), d.requests, d.preempted

    def _candidates(self, now: float, d: Draft) -> Iterator[tuple[Request, bool]]:
        """(request, whether it waits) by the policy's key; whoever is admitted meanwhile is not met twice."""
        order = self.policy.order
        queue = sorted(((order(r, now), r.rid, r) for r in self.running.values()), key=lambda e: e[:2])
        i = 0
        while True:
            head = None if d.closed else self._head()
            if i < len(queue) and (head is None or queue[i][:2] <= (head.key, head.rid)):
                i += 1
                if queue[i - 1][2].state is State.RUNNING:
                    yield queue[i - 1][2], False
            elif head is not None:
                yield head, True
            else:
                return

    def _reorder(self, now: float) -> None:
        entries = []
        for r in self.waiting.values():
            r.key = self.policy.order(r, now)
            entries.append((r.key, r.rid, r.generation, r))
        heapq.heapify(entries)
        self._heap = entries

    def _admit(self, r: Request, d: Draft) -> bool:
        """Take a waiting request in, with what the prefix index has of it.  False ends admission in this step."""
        if len(self.running) >= self.limits.max_num_seqs or not self.policy.admit(r, d.view):
            return False
        lengths, tables, idle = self.kv.match(r)
        if self.running:
            # Whoever enters must have room for its whole context beside one more block for everybody else: growth is on demand,
            # but a prompt that cannot be finished would only be preempted again.
            rest = max(0, len(r.context) - lengths[0])
            wanted = idle + blocks_for(self.kv.groups, rest, self.limits.max_rows, layered=self.policy.layered)
            wanted += 0 if r.link is not None else len(self.running)
            if wanted > self.pool.available:
                self._reclaim_parked(wanted)
                return False
        heapq.heappop(self._heap)
        del self.waiting[r.rid]
        self.kv.adopt(r, lengths, tables)
        r.state = State.RUNNING
        self.running[r.rid] = r
        if self.kv.share:
            self.queried_tokens += len(r.context)
            self.hit_tokens += lengths[0]
        if r.preemptions == 0:
            r.cached_tokens = lengths[0]
        d.view.running += 1
        d.view.waiting -= 1
        return True

    def _reclaim_parked(self, wanted: int) -> None:
        """Parked requests keep their KV only while nobody needs it."""
        for r in sorted(self.parked.values(), key=lambda x: (-x.priority, -x.arrival)):
            if self.pool.available >= wanted:
                return
            if not r.in_flight and any(t.blocks for t in r.tables):
                self.preempt(r)

    # ------------------------------------------------------------------ one request

    def _advance(self, r: Request, d: Draft) -> None:
        if r.link is not None and self._linked(r, d):
            return
        for m in range(1, len(self.models)):
            self._follow(r, m, d)
        self._target(r, d)

    def _target(self, r: Request, d: Draft, *, final: bool = False) -> bool:
        """Plan rows of the target model.  final: only the last row of a linked request.  True when a work was planned."""
        if r.in_flight and (r.partial or r.draft or r.cut or not r.publishes):
            return False  # its advance depends on what the plan in flight finds
        if r.partial is not None:
            return self._layers_on(r, d)
        start, end = r.planned[0], len(r.context)
        if start >= end:
            return False
        quota = self.policy.quota(r, d.view)
        stop = min(end, start + min(quota.rows, d.view.rows_left))
        stop = self._cut(r, start, stop)
        if r.link is not None and stop == end and not final:
            stop -= 1
        row_bytes, sample_bytes = self.limits.row_bytes, self.limits.sample_bytes
        reported = self._prompt_rows(r, start, stop)
        if reported and start + d.samples_left < stop:
            stop = start + d.samples_left
        if stop == end and d.samples_left < 1:
            stop -= 1
        if row_bytes:
            stop = min(stop, start + int((d.bytes_left - (sample_bytes if stop == end else 0)) // row_bytes))
        if stop <= start:
            return False
        layered = quota.layers is not None and quota.layers < self.layers and self.kv.parked[0] is not None
        guesses = 0 if layered or stop < end else self._guesses(r, stop, d)
        rows = stop - start + guesses
        self.kv.slide(r, 0, start)
        if not self._room(r, 0, rows, d, park=layered):
            if not guesses or not self._room(r, 0, stop - start, d, park=layered):
                return False
            guesses, rows = 0, stop - start
        d.blocks += self.kv.grow(r, 0, rows, d.ops, park=layered)
        if layered:
            assert quota.layers is not None
            r.partial = (start, stop, 0)
            return self._layers_on(r, d, quota.layers)
        self._emit(r, d, start, stop, guesses)
        r.planned[0] = stop
        return True

    def _layers_on(self, r: Request, d: Draft, layers: int | None = None) -> bool:
        """Take rows that have passed only some layers through the next ones."""
        assert r.partial is not None
        start, stop, layer = r.partial
        if layers is None:
            layers = self.policy.quota(r, d.view).layers or self.layers
        until = min(self.layers, layer + layers)
        last = until == self.layers
        if stop - start > d.view.rows_left or (last and stop == len(r.context) and d.samples_left < 1):
            return False
        self._emit(r, d, start, stop, 0, (layer, until))
        if last:
            r.planned[0] = stop
        return True

    def _follow(self, r: Request, m: int, d: Draft) -> None:
        """Another model catches up with the context (a draft model, a guide): ordinary rows, nothing sampled."""
        if r.in_flight:
            return
        start = r.planned[m]
        stop = min(len(r.context), start + d.view.rows_left)
        if stop <= start:
            return
        self.kv.slide(r, m, start)
        if not self._room(r, m, stop - start, d):
            return
        d.blocks += self.kv.grow(r, m, stop - start, d.ops)
        self._add(r, d, Work(request=r.rid, model=self.models[m], rows=((start, stop),), tokens=tuple(r.context[start:stop])))
        r.planned[m] = stop

    def _linked(self, r: Request, d: Draft) -> bool:
        """Linked requests sample together: their last rows are planned in one step or not at all.  True when dealt with."""
        family = [x for x in self.running.values() if x.link == r.link]
        everyone = sum(1 for x in (*self.waiting.values(), *self.parked.values()) if x.link == r.link) + len(family)
        if everyone == 1:
            r.link = None
            return False
        if any(x.planned[0] != len(x.context) - 1 for x in family) or len(family) < everyone:
            return False
        if any(x.in_flight or x.rid in d.planned for x in family):
            return True
        if d.samples_left < len(family) or d.view.rows_left < len(family):
            return True
        # Room for all of them, or for none: reserve first, then plan.
        for x in family:
            self.kv.slide(x, 0, x.planned[0])
            if not self.pool.reserve(x.rid, self.kv.need(x, 0, 1)):
                for y in family:
                    self.pool.reserve(y.rid, 0)
                self._make_room(r, sum(self.kv.need(y, 0, 1) for y in family), d, spare={y.rid for y in family})
                return True
        for x in family:
            self._target(x, d, final=True)
        return True

    # ------------------------------------------------------------------ bounds

    def _cut(self, r: Request, start: int, stop: int) -> int:
        if r.cut is None:
            return stop
        at = r.cut(r.prompt, start)
        return stop if at is None or at <= start else min(stop, at)

    def _prompt_rows(self, r: Request, start: int, stop: int) -> int:
        """Rows, from the chunk's first, that give a prompt logprob (position i tells of prompt token i + 1); 0 if all are known."""
        last = min(stop, r.prompt - 1)
        return max(0, last - start) if r.sampling.prompt_logprobs >= 0 and last > r.reported else 0

    def _guesses(self, r: Request, end: int, d: Draft) -> int:
        """Drafts that fit the budgets, the request's end and the next cut."""
        if not r.draft or r.link is not None:
            return 0
        room = min(
            len(r.draft), self.limits.max_guesses, d.view.rows_left - (end - r.planned[0]), d.samples_left - 1,
            r.limit - end - 1, self.limits.max_model_len - end,
        )  # fmt: skip
        if self.limits.row_bytes:
            spare = d.bytes_left - (end - r.planned[0]) * self.limits.row_bytes - self.limits.sample_bytes
            room = min(room, int(spare // (self.limits.row_bytes + self.limits.sample_bytes)))
        return max(0, self._cut(r, end, end + max(0, room)) - end)

    # ------------------------------------------------------------------ room

    def _room(self, r: Request, m: int, rows: int, d: Draft, *, park: bool = False) -> bool:
        need = self.kv.need(r, m, rows, park=park)
        return self.pool.can_take(r.rid, need) or self._make_room(r, need, d, spare={r.rid})

    def _make_room(self, r: Request, need: int, d: Draft, spare: set[int]) -> bool:
        """Preempt until `need` blocks are there for `r`.  False when nobody is left to yield, or `r` itself yielded."""
        oldest = min(self.running.values(), key=lambda x: (x.arrival, x.rid)).rid
        while not self.pool.can_take(r.rid, need):
            parked = [x for x in self.parked.values() if not x.in_flight and any(t.blocks for t in x.tables)]
            candidates = parked or [
                x
                for x in self.running.values()
                if x.rid != oldest and x.rid not in d.planned and x.rid not in spare and not x.in_flight
            ]
            if not candidates:
                return False
            victim = max(parked, key=lambda x: (x.priority, x.arrival)) if parked else self.policy.victim(r, candidates)
            if victim is None or (victim is r and (r.rid == oldest or r.in_flight or r.rid in d.planned)):
                if r.rid != oldest:
                    return False
                victim = max(candidates, key=lambda x: (x.priority, x.arrival))
            assert isinstance(victim, Request)
            self.preempt(victim, d)
            if victim is r:
                return False
        return True

    def preempt(self, victim: Request, d: Draft | None = None) -> None:
        """Take everything from a request but its context and output; it will be recomputed."""
        if victim.started:
            self.leaving.append(victim.rid)
        self.kv.release(victim)
        victim.preemptions += 1
        self.preemptions += 1
        if self.running.pop(victim.rid, None) is not None and d is not None:
            d.preempted.append(victim)
            victim.state = State.WAITING
            d.view.running -= 1
        elif victim.rid in self.parked:
            # A parked request stays parked: it only has to be computed again when it is resumed.
            pass

    # ------------------------------------------------------------------ writing the plan

    def _emit(self, r: Request, d: Draft, start: int, stop: int, guesses: int, layers: tuple[int, int] | None = None) -> None:
        end = len(r.context)
        last = layers is None or layers[1] == self.layers
        samples = stop == end and last
        reported = self._prompt_rows(r, start, stop) if last else 0
        tokens = (*r.context[start:stop], *r.draft[:guesses])
        self._add(
            r,
            d,
            Work(
                request=r.rid,
                rows=((start, stop + guesses),),
                tokens=tokens,
                layers=layers,
                mask=Mask.CAUSAL,
                keep=Keep.ACCEPT if guesses else Keep.APPEND,
                link=r.link,
                guesses=guesses,
                samples=samples,
                output=len(r.output),
                prompt_rows=reported,
            ),
            samples=(1 + guesses if samples else 0) + reported,
        )

    def _add(self, r: Request, d: Draft, work: Work, samples: int = 0) -> None:
        rows = len(work.tokens)
        d.works.append(work)
        d.requests.append(r)
        d.planned.add(r.rid)
        d.view.rows_left -= rows
        d.samples_left -= samples
        d.samples += samples
        d.bytes_left -= rows * self.limits.row_bytes + samples * self.limits.sample_bytes
        if work.samples and rows - work.guesses == 1:
            d.view.decode_rows += rows
        else:
            d.view.prompt_rows += rows

    def _finish(self, d: Draft, step: int) -> Plan:
        enter: list[Enter] = []
        grants: list[Grant] = []
        seen: set[int] = set()
        for r in d.requests:
            r.in_flight += 1
            if r.rid in seen:
                continue
            seen.add(r.rid)
            if not r.started:
                r.started = True
                for t in r.tables:
                    t.dirty = 0
                enter.append(
                    Enter(
                        request=r.rid, tokens=tuple(r.context), prompt=r.prompt, sampling=r.sampling, seed=r.seed,
                        entries=tuple(t.count for t in r.tables), spans=r.spans, vectors=r.vectors,
                    )
                )  # fmt: skip
            for g, t in enumerate(r.tables):
                if t.dirty is not None:
                    grants.append(Grant(r.rid, g, t.dirty, tuple(t.blocks[t.dirty :]), t.first))
                    t.dirty = None
        leave, self.leaving = tuple(self.leaving), []
        rows = self.limits.max_rows - d.view.rows_left
        return Plan(
            step=step, works=tuple(d.works), enter=tuple(enter), leave=leave, grants=tuple(grants), kv=tuple(d.ops),
            rows=rows, samples=d.samples, blocks=d.blocks,
            work_bytes=rows * self.limits.row_bytes + d.samples * self.limits.sample_bytes,
        )  # fmt: skip
