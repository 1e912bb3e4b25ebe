"""Who is running, who waits, who is parked and who is linked: the lists that a scheduler plans from."""

from __future__ import annotations

import heapq

from weft.config import Limits, Stack
from weft.core import switch
from weft.core.kv import KV
from weft.core.ledger import blocks_for
from weft.core.planning import Planning
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
        self._heap: list[tuple[tuple[float, ...], int, int, Request]] = []

    # ------------------------------------------------------------------ the queue

    def enqueue(self, request: Request, now: float) -> None:
        request.state = State.WAITING
        self.waiting[request.rid] = request
        request.key = self.policy.order(request, now)
        heapq.heappush(self._heap, (request.key, request.rid, request.generation, request))
        if len(self._heap) > 2 * len(self.waiting) + 64:
            # Those who left the queue without reaching its head are still in the heap.
            self._heap = [e for e in self._heap if self._waits(e)]
            heapq.heapify(self._heap)

    def remove(self, request: Request) -> None:
        """Out of every list, without its blocks."""
        self.unlink(request)
        if request.started:
            self.leaving.append(request.rid)
        self.kv.release(request)
        for group in (self.running, self.parked, self.waiting):
            group.pop(request.rid, None)
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

    def _waits(self, entry: tuple[tuple[float, ...], int, int, Request]) -> bool:
        _, rid, generation, request = entry
        return self.waiting.get(rid) is request and request.generation == generation

    def head(self) -> Request | None:
        """Who waits first."""
        while self._heap:
            if self._waits(self._heap[0]):
                return self._heap[0][3]
            heapq.heappop(self._heap)
        return None

    def _heads(self, most: int) -> list[Request]:
        """The first `most` requests of the queue, in order: a heap is a tree whose smallest are found from its root down."""
        found: list[Request] = []
        edge = [(self._heap[0][:3], 0)] if self._heap else []
        while edge and len(found) < most:
            _, i = heapq.heappop(edge)
            if self._waits(self._heap[i]):
                found.append(self._heap[i][3])
            for child in (2 * i + 1, 2 * i + 2):
                if child < len(self._heap):
                    heapq.heappush(edge, (self._heap[child][:3], child))
        return found

    def _reorder(self, now: float) -> None:
        for r in self.waiting.values():
            r.key = self.policy.order(r, now)
        self._heap = [(r.key, r.rid, r.generation, r) for r in self.waiting.values()]
        heapq.heapify(self._heap)

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
