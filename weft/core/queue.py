"""Who waits, in the order of a schedule that says no more of it than keys: a heap.

put    a request waits from now on
drop   it does so no longer
first  who is next
heads  who comes after that, as it looks now

A schedule whose keys change while requests wait, and who keeps them itself, has the same four (`slots.Queueing`).
"""

from __future__ import annotations

import heapq
from typing import cast

from weft.core.request import Request
from weft.slots import Queueing, Schedule

Entry = tuple[tuple[float, ...], int, int, Request]


class ByKey:
    """A step looks at the heap's head, and nobody else who waits costs anything, where keys stay as they were (`static`).

    Where they don't, all are asked anew as soon as time has passed, which costs a step as much as there are requests.
    """

    def __init__(self, policy: Schedule) -> None:
        self._order, self._static = policy.order, policy.static
        self._heap: list[Entry] = []
        self._times: dict[int, int] = {}
        """By rid, which of its entries counts."""
        self._entered = 0
        self._asked = float("-inf")

    def put(self, request: Request, now: float) -> None:
        self._entered += 1
        request.key = self._order(request, now)
        self._times[request.rid] = self._entered
        heapq.heappush(self._heap, (request.key, request.rid, self._entered, request))
        if len(self._heap) > 2 * len(self._times) + 64:
            # Those who left without reaching the head are still in the heap.
            self._heap = [e for e in self._heap if self._waits(e)]
            heapq.heapify(self._heap)

    def drop(self, request: Request) -> None:
        self._times.pop(request.rid, None)

    def first(self, now: float) -> Request | None:
        if not self._static and now != self._asked:
            self._ask(now)
        while self._heap:
            if self._waits(self._heap[0]):
                return self._heap[0][3]
            heapq.heappop(self._heap)
        return None

    def heads(self, most: int, now: float) -> list[Request]:
        """The first `most`, in order: a heap is a tree whose smallest are found from its root down."""
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

    def _waits(self, entry: Entry) -> bool:
        return self._times.get(entry[1]) == entry[2]

    def _ask(self, now: float) -> None:
        self._asked = now
        self._heap = [e for e in self._heap if self._waits(e)]
        for _, _, _, request in self._heap:
            request.key = self._order(request, now)
        self._heap = [(r.key, rid, n, r) for _, rid, n, r in self._heap]
        heapq.heapify(self._heap)


class Own:
    """The queue of a schedule that keeps it itself."""

    def __init__(self, policy: Schedule) -> None:
        self._policy, self._queue = policy, cast(Queueing, policy)

    def put(self, request: Request, now: float) -> None:
        self._queue.put(request, now)

    def drop(self, request: Request) -> None:
        self._queue.drop(request)

    def first(self, now: float) -> Request | None:
        request = cast("Request | None", self._queue.first(now))
        if request is not None:
            request.key = self._policy.order(request, now)
        return request

    def heads(self, most: int, now: float) -> list[Request]:
        return cast("list[Request]", list(self._queue.heads(most, now)))


def queue_of(policy: Schedule) -> ByKey | Own:
    return Own(policy) if getattr(policy, "queues", False) else ByKey(policy)
