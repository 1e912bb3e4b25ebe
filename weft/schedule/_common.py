"""What schedules share: whom most of them let yield, and a queue for those whose order changes while requests wait."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from weft.slots import RequestView

T = TypeVar("T")
Key = tuple[float, ...]


def latest(needy: RequestView, candidates: Sequence[RequestView]) -> RequestView:
    """The latest of the lowest priority, which may be `needy` itself."""
    return max([*candidates, needy], key=lambda r: (r.priority, r.arrival))


class Least(Generic[T]):
    """Things by name, the one of the least key first.  To put one again gives it another key; each costs the logarithm of all."""

    def __init__(self) -> None:
        self._heap: list[tuple[Key, int, Hashable]] = []
        self._there: dict[Hashable, tuple[int, T]] = {}
        self._puts = 0

    def __len__(self) -> int:
        return len(self._there)

    def put(self, name: Hashable, key: Key, thing: T) -> None:
        self._puts += 1
        self._there[name] = self._puts, thing
        heapq.heappush(self._heap, (key, self._puts, name))
        if len(self._heap) > 2 * len(self._there) + 64:
            self._heap = [e for e in self._heap if self._counts(e)]
            heapq.heapify(self._heap)

    def drop(self, name: Hashable) -> None:
        self._there.pop(name, None)

    def first(self) -> tuple[Key, T] | None:
        """(key, thing); equal keys in the order in which they were put."""
        while self._heap:
            if self._counts(self._heap[0]):
                key, _, name = self._heap[0]
                return key, self._there[name][1]
            heapq.heappop(self._heap)
        return None

    def heads(self, most: int) -> list[tuple[Key, T]]:
        """The first `most`, in order: a heap is a tree whose smallest are found from its root down."""
        found: list[tuple[Key, T]] = []
        if self.first() is None:  # which lets go of what stands before it and does not count
            return found
        edge = [(self._heap[0], 0)]
        while edge and len(found) < most:
            entry, i = heapq.heappop(edge)
            if self._counts(entry):
                found.append((entry[0], self._there[entry[2]][1]))
            for child in range(2 * i + 1, min(2 * i + 3, len(self._heap))):
                heapq.heappush(edge, (self._heap[child], child))
        return found

    def settled(self, most: int, key: Callable[[T], Key], again: Callable[[T, Key], None]) -> list[T]:
        """The first `most` where keys may only have grown since they were put: who stands too far in front is put again.

        key: as it is now.  again: puts a thing where that says.
        """
        while True:
            found = self.heads(most)
            moved = [(thing, now) for was, thing in found if (now := key(thing)) != was]
            if not moved:
                return [thing for _, thing in found]
            for thing, now in moved:
                again(thing, now)

    def _counts(self, entry: tuple[Key, int, Hashable]) -> bool:
        found = self._there.get(entry[2])
        return found is not None and found[0] == entry[1]
