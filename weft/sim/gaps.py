"""How far the tokens of answers are apart: of every request the longest gap, of all gaps the percentiles.

Millions of gaps are not kept: they are counted in bins that are 1 % wide, so that a percentile is told within half of that.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence

STEP = math.log(1.01)
NONE = -(1 << 30)
"""The bin of tokens that came together."""


class Gaps:
    """last: when a request's latest token came, nan before its first.  longest: its longest gap so far."""

    def __init__(self) -> None:
        self.last, self.longest = array("d"), array("d")
        self._bins = Counter[int]()

    def arrives(self) -> None:
        """A request more."""
        self.last.append(math.nan)
        self.longest.append(0.0)

    def said(self, id: int, now: float, tokens: int = 1) -> None:
        """So many tokens of a request come together."""
        gap = now - self.last[id]
        self.last[id] = now
        if gap != gap:
            return
        if tokens > 1:
            self.count(0.0, tokens - 1)
        self.count(gap, 1)
        if gap > self.longest[id]:
            self.longest[id] = gap

    def count(self, gap: float, many: int) -> None:
        """So many tokens came so long after the ones before them; `until` tells of whom."""
        self._bins[math.floor(math.log(gap) / STEP) if gap > 0 else NONE] += many

    def until(self, id: int, now: float, longest: float) -> None:
        """Gaps of a request that were counted already: the last one ended now, none was longer than `longest`."""
        self.last[id] = now
        if longest > self.longest[id]:
            self.longest[id] = longest

    def summary(self, first: Sequence[float], quantiles: Sequence[float]) -> dict[str, float]:
        """The mean of all gaps, and percentiles by name.  first: when each request's first token came, or nan."""
        number = self._bins.total()
        whole = math.fsum(end - start for start, end in zip(first, self.last, strict=True) if start == start)
        found = {"mean": whole / number if number else 0.0}
        ordered = sorted(self._bins.items())
        for q in quantiles:
            rank, at = q * (number - 1), -1
            for bin, many in ordered:
                at += many
                if at >= rank:
                    found[f"p{round(100 * q)}"] = math.exp((bin + 0.5) * STEP) if bin != NONE else 0.0
                    break
            else:
                found[f"p{round(100 * q)}"] = 0.0
        return found
