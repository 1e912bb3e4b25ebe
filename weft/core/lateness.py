"""Who can't be in time any more: what a first token takes at least, by what steps took, for a schedule that refuses.

The time is a lower bound for a request that would be next.  Its rows are those of its prompt that neither the prefix index has
nor a request that runs has computed (what that one still has to compute of them takes as long there).  Each is taken to cost
what a row cost in the cheapest step of the last seconds that was at least as large as a step of this prompt would be (a smaller
step spreads what every step costs over fewer rows, so it says nothing of a larger one).  Where no such step was seen, rows are
taken to cost nothing: then only who has waited too long already is late.  One slow step is forgotten after a while, so that
it can't keep large prompts away for ever.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from weft.config import Limits
from weft.core.kv import KV
from weft.core.request import Request
from weft.slots import Refusing

RECENT_S = 10.0
"""Steps count for so long."""


@dataclass(frozen=True, slots=True)
class Late:
    """A request that is refused.  rows: still to compute.  least_s: what they take at least."""

    request: Request
    rows: int
    least_s: float

    def text(self, now: float) -> str:
        """What its client is told."""
        waited = f"it has waited {max(0.0, now - self.request.arrival):.3g} s"
        work = f", and its {self.rows} rows take at least {self.least_s:.3g} s more" if self.least_s else ""
        return f"the first token of this request can't come in time any more: {waited}{work}; ask again later"


class Lateness:
    """Finds before each step who can't be in time, by when a schedule that refuses says that they are due."""

    def __init__(self, policy: Refusing, kv: KV, limits: Limits) -> None:
        self.policy, self.kv, self.limits = policy, kv, limits
        self._begun: dict[int, float] = {}
        """When plans in flight with prompts in them were made."""
        self._ended = 0.0
        self._seen: list[tuple[float, int, float]] = []
        """(when, rows, seconds of a row) of steps; none of which a later one was as large as, and as cheap."""
        self._lines: dict[int, list[tuple[float, int, Request]]] = {}
        """(due, rid, request) in the order in which they are due, by the digits of their rows."""

    # ------------------------------------------------------------------ what steps take

    def planned(self, step: int, now: float, rows: int, prompt_rows: int) -> None:
        """A step begins.  Rows that decode cost otherwise than a prompt's, so steps of which they are most say nothing."""
        if 2 * prompt_rows >= rows > 0:
            self._begun[step] = now

    def committed(self, step: int, now: float, rows: int) -> None:
        """A step has ended; a plan made before the one before it had ended began when that did."""
        begun = self._begun.pop(step, None)
        if begun is not None and (took := now - max(begun, self._ended)) > 0:
            each = took / rows
            kept = [s for s in self._seen if s[0] > now - RECENT_S and not (s[1] <= rows and s[2] >= each)]
            self._seen = [*kept, (now, rows, each)]
        self._ended = now

    def abandoned(self, step: int, now: float) -> None:
        self._begun.pop(step, None)
        self._ended = now

    def least_s(self, rows: int, now: float) -> float:
        """What so many rows of a prompt take at least; 0.0 where it is not known."""
        size = min(rows, self.limits.max_rows)
        return rows * min((each for at, n, each in self._seen if n >= size and at > now - RECENT_S), default=0.0)

    def _most_s(self, least: int, most: int, now: float) -> float:
        """What no prompt of `least` to `most` rows is said to take more than."""
        size = min(least, self.limits.max_rows)
        return most * max((each for at, n, each in self._seen if n >= size and at > now - RECENT_S), default=0.0)

    # ------------------------------------------------------------------ who is late

    def watch(self, r: Request) -> None:
        """A new request, which is refused when it can't be in time any more; if it has a deadline."""
        if r.spec.ttft_s is not None and r.leader is None and not (r.output or r.index):
            line = self._lines.setdefault(len(r.context).bit_length(), [])
            bisect.insort(line, (self.policy.due(r), r.rid, r))

    def find(self, waiting: Mapping[int, Request], running: Iterable[Request], now: float) -> list[Late]:
        """Those who wait and can't be in time any more.  Who has no deadline, or has had a turn, is not asked about.

        Prompts of about the same length stand in a line by when they are due.  From where on the longest would be in time, nobody
        is looked at.
        """
        found: list[Late] = []
        for bits, line in self._lines.items():
            if len(line) > 2 * len(waiting) + 64:
                line[:] = [e for e in line if e[1] in waiting]
            soon, stay = now + self._most_s(1 << bits - 1, (1 << bits) - 1, now), list[tuple[float, int, Request]]()
            looked = 0
            for due, rid, r in line:
                if soon <= due:
                    break
                looked += 1
                if rid not in waiting or r.generation or r.output:
                    continue
                late = self._late(r, due, running, now)
                if late is None:
                    stay.append((due, rid, r))
                else:
                    found.append(late)
            line[:looked] = stay
        return sorted(found, key=lambda late: late.request.rid)

    def _late(self, r: Request, due: float, running: Iterable[Request], now: float) -> Late | None:
        rows = len(r.context)
        if now > due:
            return Late(r, rows, 0.0)
        if now + self.least_s(rows, now) <= due:
            return None
        rows -= self._spared(r, running)
        least_s = self.least_s(rows, now)
        return Late(r, rows, least_s) if now + least_s > due else None

    def _spared(self, r: Request, running: Iterable[Request]) -> int:
        """Rows of its prompt that the prefix index has, or that somebody who runs has, for a block that is not full yet."""
        most = self.kv.match(r)[0][0]
        for other in running:
            for size, names in r.names.items():
                alike = itertools.takewhile(
                    lambda two: two[0] == two[1], zip(names, other.names.get(size, ()), strict=False)
                )
                most = max(most, min(size * sum(1 for _ in alike), other.planned[0]))
        return min(most, len(r.context) - 1)
