"""Who can't be in time any more: what a first token takes at least, by what steps took, for a schedule that refuses.

The time is a lower bound for a request that would be next.  Its rows are those of its prompt that neither the prefix index has
nor a request that runs has computed (what that one still has to compute of them takes as long there).  Each is taken to cost
what a row cost in the cheapest step of the last seconds that was at least as large as a step of this prompt would be (a smaller
step spreads what every step costs over fewer rows, so it says nothing of a larger one).  Where no such step was seen, rows are
taken to cost nothing: then only who has waited too long already is late.  One slow step is forgotten after a while, so that
it can't keep large prompts away for ever.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
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
    """Asks a schedule that refuses about everybody who waits, before each step."""

    def __init__(self, policy: Refusing, kv: KV, limits: Limits) -> None:
        self.policy, self.kv, self.limits = policy, kv, limits
        self._begun: dict[int, float] = {}
        """When plans in flight with prompts in them were made."""
        self._ended = 0.0
        self._seen: list[tuple[float, int, float]] = []
        """(when, rows, seconds of a row) of steps; none of which a later one was as large as, and as cheap."""

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

    # ------------------------------------------------------------------ who is late

    def find(self, waiting: Iterable[Request], running: Iterable[Request], now: float) -> list[Late]:
        """Those who wait and can't be in time any more.  Who has no deadline, or has had a turn, is not asked about."""
        found, late = [], self.policy.late
        for r in waiting:
            rows = len(r.context)
            if r.spec.ttft_s is None or r.generation or r.output or r.index or r.leader is not None:
                continue
            if not late(r, now, self.least_s(rows, now)):
                continue
            if late(r, now, 0.0):
                found.append(Late(r, rows, 0.0))
                continue
            rows -= self._spared(r, running)
            least_s = self.least_s(rows, now)
            if late(r, now, least_s):
                found.append(Late(r, rows, least_s))
        return found

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
