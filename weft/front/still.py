"""When a request counts as standing still in an engine that steps.  Pure: how far it is, the time and the step are handed in."""

from __future__ import annotations

STILL_STEPS = 16
"""Steps of the engine that a request must have stood still through: time alone may be that of a step which is only long."""
LONG = 1024
"""Tokens of a context for which it gets the same time once more: they may have to be computed before any token comes."""
MOST_AGAIN = 4
"""How often a request that stands still is computed again, each time after twice as long, before it is given up."""


class Stillness:
    """What is known of one request.  It begins with its first turn: what waits stands in a queue, and not still."""

    __slots__ = ("_mark", "retries")

    def __init__(self) -> None:
        self._mark: tuple[int, float, int] | None = None
        """How far it was when that last changed, the time and the step of it; None while it waits."""
        self.retries = 0
        """How often it was computed again since it last advanced."""

    @property
    def hopeless(self) -> bool:
        return self.retries > MOST_AGAIN

    def wait(self) -> None:
        """It has to wait for its next turn."""
        self._mark = None

    def overdue(self, progress: int, length: int, now: float, step: int, limit_s: float, turn: bool) -> bool:
        """Whether it has stood still too long, and is to be computed again.  length: of its context.  turn: it is in the plan."""
        mark = self._mark
        if mark is None or mark[0] != progress:
            if mark is not None:
                self.retries = 0
            self._mark = (progress, now, step) if turn or mark is not None else None
            return False
        limit_s *= 2**self.retries * (1 + length / LONG)
        if now - mark[1] <= limit_s or step - mark[2] < STILL_STEPS:
            return False
        self._mark = None
        self.retries += 1
        return True
