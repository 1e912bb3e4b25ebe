"""Distributions compared: Pearson's chi-square, and what it can see.

Legend.  N: draws.  p: probabilities of the cells under the law.  alpha: chance that an exact sampler fails the test.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

ALPHA = 1e-3
"""One exact sampler in a thousand fails; seeds are fixed, so that one which holds holds again."""
LEAST_EXPECTED = 5.0
"""Cells that are expected less often are put together (Cochran's rule)."""
C = TypeVar("C", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Fit:
    """chi2 over `freedom` degrees; p: chance of one at least as large under the law."""

    chi2: float
    freedom: int
    p: float

    @property
    def ok(self) -> bool:
        return self.p > ALPHA


def fit(drawn: Sequence[C], law: Mapping[C, float]) -> Fit:
    """How well draws fit a law.  A draw that the law never gives fails at once."""
    counts, n = Counter(drawn), len(drawn)
    if any(law.get(cell, 0.0) <= 0.0 for cell in counts):
        return Fit(math.inf, 0, 0.0)
    cells = sorted(((p * n, counts.get(cell, 0)) for cell, p in law.items() if p > 0), reverse=True)
    grouped: list[list[float]] = []
    for expected, seen in cells:
        if grouped and (expected < LEAST_EXPECTED or grouped[-1][0] < LEAST_EXPECTED):
            grouped[-1][0] += expected
            grouped[-1][1] += seen
        else:
            grouped.append([expected, float(seen)])
    freedom = len(grouped) - 1
    if freedom < 1:
        return Fit(0.0, 0, 1.0)
    chi2 = sum((seen - expected) ** 2 / expected for expected, seen in grouped)
    return Fit(chi2, freedom, survival(chi2, freedom))


def alike(one: Sequence[C], other: Sequence[C]) -> Fit:
    """How well two samples fit one law that nobody knows (chi-square of homogeneity)."""
    a, b = Counter(one), Counter(other)
    share = min(len(one), len(other)) / (len(one) + len(other))
    cells = sorted(((a[cell] + b[cell], a[cell]) for cell in a | b), reverse=True)
    grouped: list[tuple[int, int]] = []
    for both, first in cells:
        if grouped and share * min(both, grouped[-1][0]) < LEAST_EXPECTED:
            both, first = grouped[-1][0] + both, grouped[-1][1] + first
            grouped.pop()
        grouped.append((both, first))
    freedom = len(grouped) - 1
    if freedom < 1:
        return Fit(0.0, 0, 1.0)
    p = len(one) / (len(one) + len(other))
    chi2 = sum((first - both * p) ** 2 / (both * p * (1 - p)) for both, first in grouped)
    return Fit(chi2, freedom, survival(chi2, freedom))


def survival(chi2: float, freedom: int) -> float:
    """P(X >= chi2) for X chi-square distributed: the regularized upper incomplete gamma function."""
    a, x = torch.tensor(freedom / 2, dtype=torch.float64), torch.tensor(chi2 / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(a, x))


def power(law: Mapping[C, float], other: Mapping[C, float], draws: int) -> float:
    """Chance that `fit` fails a sampler of `other` after so many draws (normal approximation of the noncentral chi-square)."""
    shift = draws * sum((other.get(c, 0.0) - p) ** 2 / p for c, p in law.items() if p > 0)
    freedom = max(1, sum(p > 0 for p in law.values()) - 1)
    limit = critical(freedom)
    mean, spread = freedom + shift, math.sqrt(2 * (freedom + 2 * shift))
    return 0.5 * math.erfc((limit - mean) / (spread * math.sqrt(2)))


def critical(freedom: int, alpha: float = ALPHA) -> float:
    """The chi-square that an exact sampler exceeds with chance alpha (bisection)."""
    low, high = 0.0, 10.0 * freedom + 200.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if survival(middle, freedom) > alpha else (low, middle)
    return high
