"""What the journal knows of one request and of its sequences."""

from __future__ import annotations

from msgspec import structs

from weft.front.still import Stillness
from weft.types import Adapted, Event, Finished, Rejected, RequestSpec

MARK = "search="
"""A request with such a part is run by a program that is asked anew from the start, and finds the same."""
MOST_EXCUSED = 4
"""Deaths in a row on rows that an engine had computed before, after which these, too, speak against a request."""


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
    many of those to come it has already.  reached: rows of a context of its that an engine has told to be computed, at most.
    died_at: how far it was at the last death.  strikes: deaths that it was part of without any advance in between; excused: those
    that did not speak against it; alone: those with nobody else in the engine.  sent: whether an engine has had it.  begun:
    whether it has had a turn.  passed: whether it has been tried alone."""

    __slots__ = (
        "again", "alone", "begun", "died_at", "excused", "ids", "lines", "passed", "reached", "sent", "skip", "spec", "still",
        "strikes", "told",
    )  # fmt: skip

    def __init__(self, spec: RequestSpec) -> None:
        self.spec = spec
        self.again = any(part.startswith(MARK) for part in spec.techniques)
        self.lines = [Line() for _ in range(spec.n)]
        self.ids: list[int] = []
        self.told = 0
        self.skip = 0
        self.reached = 0
        self.died_at = -1
        self.strikes = self.excused = self.alone = 0
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
    def given(self) -> int:
        """How much the front has of it."""
        return self.told + sum(len(line.output) + line.done for line in self.lines)

    @property
    def known(self) -> int:
        """Rows of its longest context that some engine has computed and lived."""
        output = max(len(line.output) for line in self.lines)
        return max(self.reached, sum(item.rows for item in self.spec.items) + output - 1 if output else 0)

    @property
    def progress(self) -> int:
        """How far it is; it never falls."""
        return self.given + self.known

    def suspected(self, stop: int) -> bool:
        """Whether the death of an engine that was to compute its rows up to `stop` speaks against it.  Not where an engine has
        done just that before, as behind every death all contexts are computed again; unless that goes on and on."""
        if self.died_at != self.progress:
            self.excused = 0
        if stop > self.known or self.excused == MOST_EXCUSED:
            return True
        self.excused += 1
        return False


def renamed(event: Event, id: int, index: int | None) -> Event:
    """An event of the engine under the front's names."""
    if index is None or isinstance(event, Rejected | Adapted):
        return structs.replace(event, id=id)
    return structs.replace(event, id=id, index=index)
