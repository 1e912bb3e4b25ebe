"""The lengths that promise the most tokens a second, from what is hoped of each sequence and from what a step takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weft.core.control import Costs

LEAST = 0.02
"""A guess that is less likely to stand is not looked at: it never pays for its row."""


def lengths(
    hopes: Sequence[float],
    most: Sequence[int],
    size: int,
    costs: Costs,
    guess_s: float,
    least: float,
    soft: Sequence[bool] = (),
    early: Sequence[bool] = (),
    beside: bool = False,
) -> list[int]:
    """Guesses for each of some sequences, of `size` that decode, at the most tokens a second; none where `least` is not passed.

    hopes: how often guesses stand, 0 for a sequence that is to have none.  most: for each the longest that it may have.  soft:
    whose rows have soft tokens behind them.  early: whose draft writes behind guesses that are not verified yet; beside: while
    they are.
    """
    worth = sorted(
        (-gain, k, i) for i, a in enumerate(hopes) for k in range(1, most[i] + 1)
        if (gain := alternating(a, k) - alternating(a, k - 1) if early and early[i] else a**k) > LEAST
    )  # fmt: skip
    best, chosen, rows_s = least, list[tuple[float, int, int]](), dict[int, float]()
    for longest in range(1, max(most) + 1):
        some = [x for x in worth if x[1] <= longest]
        tokens, rows = float(size), size
        draft_s = guess_s * (longest + any(early))
        for taken, (gain, k, i) in enumerate(some, 1):
            tokens -= gain
            rows += 2 * k + 1 if soft and soft[i] else 1
            if rows not in rows_s:
                rows_s[rows] = costs(rows, beside) or math.inf
            step_s = max(rows_s[rows], draft_s) if beside else rows_s[rows] + draft_s
            if (rate := tokens / step_s) > best:
                best, chosen = rate, some[:taken]
    wants = [0] * len(hopes)
    for _, k, i in chosen:
        wants[i] = max(wants[i], k)
    return wants


def alternating(a: float, k: int) -> float:
    """Tokens of a step where k guesses are in hand only if all before them, and the token between, stood (PEARL, 002-50).

    A step that verifies k gives 1 + a + ... + a^k tokens and is followed by another such one with chance a^(k + 1); one that
    verifies none gives 1, and with chance a is followed by one that does.  So x = x a^(k + 1) + (1 - x) a of all steps verify.
    """
    if a <= 0.0:
        return 1.0
    return 1.0 + a / (1.0 + a - a ** (k + 1)) * sum(a**j for j in range(1, k + 1))
