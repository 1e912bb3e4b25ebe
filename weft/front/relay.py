"""`Relay`: what a thread hands over to an event loop, a short while of it in each turn of the loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

TURN_S = 0.002
"""For what was handed over, in one turn of the event loop."""


class Relay(Generic[T]):
    """Calls `take` on the loop with each item, in order.

    Where items come faster than they are taken, everybody else of the loop has a turn every `TURN_S`: an engine that is faster
    than its text is written does not hold up the streams of others.  And the loop is woken once for all that has gathered, since
    to wake it gives Python's lock away, which a thread gets back from a busy loop after some milliseconds only.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, take: Callable[[T], None]) -> None:
        self._loop, self._take = loop, take
        self._items: deque[T] = deque()
        self._due = False
        """Whether the loop will look at the items.  Taken back before it does, so that none is left."""

    def put(self, item: T) -> None:
        """From any thread."""
        self._items.append(item)
        if self._due and not self._loop.is_closed():
            return
        self._due = True
        try:
            self._loop.call_soon_threadsafe(self._some)
        except RuntimeError:  # the loop was closed in the meantime: nobody is left to tell
            self._items.clear()

    def _some(self) -> None:
        self._due, until = False, time.perf_counter() + TURN_S
        try:
            while self._items:
                self._take(self._items.popleft())
                if time.perf_counter() >= until:
                    break
        finally:
            if self._items and not self._due:
                self._due = True
                self._loop.call_soon(self._some)
