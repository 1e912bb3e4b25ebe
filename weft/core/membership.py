"""Who is running, who waits, who is parked and who is linked: the lists that a scheduler plans from."""

from __future__ import annotations

from weft.config import Limits, Stack
from weft.core import switch
from weft.core.kv import KV
from weft.core.ledger import blocks_for
from weft.core.planning import Planning
from weft.core.queue import queue_of
from weft.core.request import Request, State
from weft.slots import Schedule


class Membership:
    """Owns every list of requests; `Scheduler` fills steps from them."""

    def __init__(self, kv: KV, policy: Schedule, limits: Limits, base: Stack) -> None:
        self.kv, self.pool, self.policy, self.limits, self.base = kv, kv.pool, policy, limits, base
        draft = base.get("draft")
        self.switches = bool(getattr(policy, "switches", False))
        self._drafts = draft is not None and draft.model is not None
        self._target_groups = [g for g in kv.groups if g.model == kv.models[0]]
        self.running: dict[int, Request] = {}
        self.parked: dict[int, Request] = {}
        self.waiting: dict[int, Request] = {}
        self.links: dict[int, dict[int, Request]] = {}
        """Linked requests by link and rid."""
        self.leaving: list[int] = []
        self.forked: list[Request] = []
        """Forks that the executor has not heard of."""
        self.preemptions = 0
        self.guessed = 0
        """Live requests for which guesses may be made."""
        self.queue = queue_of(policy)
        self.queued_rows = 0
        """Rows of the contexts of those who wait, as they were when they came: `_rows` has each."""
        self._rows: dict[int, int] = {}

    # ------------------------------------------------------------------ the queue

    def enqueue(self, request: Request, now: float) -> None:
        request.state = State.WAITING
        self.waiting[request.rid] = request
        self._rows[request.rid] = len(request.context)
        self.queued_rows += self._rows[request.rid]
        self.queue.put(request, now)

    def unqueue(self, request: Request) -> None:
        """Out of the queue, if it is there."""
        if self.waiting.pop(request.rid, None) is not None:
            self.queued_rows -= self._rows.pop(request.rid)
            self.queue.drop(request)

    def remove(self, request: Request) -> None:
        """Out of every list, without its blocks."""
        self.unlink(request)
        if request.started:
            self.leaving.append(request.rid)
        self.kv.release(request)
        self.unqueue(request)
        self.running.pop(request.rid, None)
        self.parked.pop(request.rid, None)
        request.state = State.DONE

    def footprint(self, request: Request) -> int:
        """Blocks that the request holds at most, alone, in all its models."""
        return self._blocks(request, min(request.limit, self.limits.max_model_len))

    def _blocks(self, request: Request, tokens: int) -> int:
        """Blocks for `tokens` positions of a request, or for as many entries as its stack keeps of them."""
        kept = request.stack.budget(request.prompt, tokens)
        groups = self.kv.groups if self.follows(request) else self._target_groups
        ahead = 2 * self.limits.max_guesses if self._drafts else 0
        return blocks_for(groups, tokens, self.limits.max_rows, layered=self.policy.layered, kept=kept, ahead=ahead)

    def follows(self, request: Request) -> bool:
        """Whether models beside the target compute this request: a draft model only what it guesses for."""
        if not self._drafts:
            return True
        return request.link is None and request.followed and request.stack["draft"].model is not None

    def link(self, number: int, members: list[Request]) -> None:
        for r in members:
            self.unlink(r)
            r.link = number
        self.links[number] = {r.rid: r for r in members}

    def unlink(self, request: Request) -> None:
        if request.link is None:
            return
        others = self.links[request.link]
        del others[request.rid]
        if len(others) == 1:
            (last,) = others.values()
            del self.links[request.link]
            last.link = None
        request.link = None

    def linked(self, request: Request) -> list[Request]:
        """The request and those that are sampled together with it."""
        return [request] if request.link is None else list(self.links[request.link].values())

    def restart(self, request: Request, now: float) -> None:
        """Back to the queue without blocks, with those linked to it; what is parked stays parked."""
        for r in self._strip(request):
            self.enqueue(r, now)

    # ------------------------------------------------------------------ preemption

    def preempt(self, victim: Request, d: Planning | None = None) -> None:
        """Take everything but context and output from a request and those linked to it; they will be recomputed.

        A parked one stays parked: it only has to be computed again once it is resumed.
        """
        for r in self.linked(victim):
            r.preemptions += 1
            self.preemptions += 1
        if d is not None and self.switches:
            d.ops += switch.saves(self.kv, self.linked(victim))
        ran = self._strip(victim)
        if d is not None:
            d.preempted.extend(ran)
            d.view.running -= len(ran)

    def _victim(self, r: Request, d: Planning) -> Request | None:
        parked = [x for x in self.parked.values() if any(t.blocks for t in x.tables)]
        if parked:
            return max(parked, key=lambda x: (x.priority, x.arrival))
        oldest = min(self.running.values(), key=lambda x: (x.arrival, x.rid))
        safe = {x.rid for x in self.linked(oldest)}
        for x in self.running.values():
            if x.in_flight or x.loading or x.rid in d.planned:
                safe.update(y.rid for y in self.linked(x))
        own = {x.rid for x in self.linked(r)}
        candidates = [x for x in self.running.values() if x.rid not in safe and x.rid not in own]
        if not candidates:
            return None
        victim = self.policy.victim(r, candidates)
        assert victim is None or isinstance(victim, Request)
        if victim is None or victim.rid in own & safe:
            # The oldest must go on: if the policy has no answer, the lowest priority yields to it.
            return max(candidates, key=lambda x: (x.priority, x.arrival)) if oldest.rid in own else None
        return victim

    def reclaim_parked(self, wanted: int) -> None:
        """Parked requests keep their KV only while nobody needs it."""
        for r in sorted(self.parked.values(), key=lambda x: (-x.priority, -x.arrival)):
            if self.pool.available >= wanted:
                return
            if any(t.blocks for t in r.tables):
                self.preempt(r)

    def _strip(self, request: Request) -> list[Request]:
        """Take blocks and progress from a request and those linked to it; returns those that were running."""
        ran = []
        for r in self.linked(request):
            if r.state is State.WAITING:
                continue
            if r.started:
                self.leaving.append(r.rid)
            self.kv.release(r)
            if self.running.pop(r.rid, None) is not None:
                r.state = State.WAITING
                ran.append(r)
        return ran
