"""What the journal knows of one request and of its sequences."""

from __future__ import annotations

from weft.front.still import Stillness
from weft.types import Event, Finished, RequestSpec

MARK = "search="
"""A request with such a part is run by a program that is asked anew from the start, and finds the same."""


class Line:
    """One sequence of a request.  cached: prompt tokens found in the prefix index, once told.  skip: tokens to come that the
    front has already, of a request that is run again from its start."""

    __slots__ = ("cached", "done", "output", "skip")

    def __init__(self) -> None:
        self.output: list[int] = []
        self.cached: int | None = None
        self.done = False
        self.skip = 0


class Entry:
    """A live request.  ids: the engine's ids that stand for it.  told: prompt log-probabilities that the front has; skip: how
    many of those to come it has already.  died_at: how far it was at the last death.  strikes: deaths that it was part of without
    any advance in between; alone: those with nobody else in the engine.  sent: whether an engine has had it.  begun: whether it
    has had a turn.  passed: whether it has been tried alone."""

    __slots__ = (
        "again", "alone", "begun", "died_at", "ids", "lines", "passed", "sent", "skip", "spec", "still", "strikes", "told",
    )  # fmt: skip

    def __init__(self, spec: RequestSpec) -> None:
        self.spec = spec
        self.again = any(part.startswith(MARK) for part in spec.techniques)
        self.lines = [Line() for _ in range(spec.n)]
        self.ids: list[int] = []
        self.told = 0
        self.skip = 0
        self.died_at = -1
        self.strikes = self.alone = 0
        self.sent = self.passed = self.begun = False
        self.still = Stillness()

    @property
    def length(self) -> int:
        """Positions of its contexts."""
        return sum(item.rows for item in self.spec.items) + sum(len(line.output) for line in self.lines)

    def failed(self, text: str) -> list[Event]:
        """What the front is told when it is given up."""
        return [Finished(self.spec.id, i, "error", error=text) for i, x in enumerate(self.lines) if not x.done]

    @property
    def progress(self) -> int:
        """How far it is; it never falls."""
        return self.told + sum(len(line.output) + line.done for line in self.lines)
