"""The lengths that promise the most tokens a second, from what is hoped of each sequence and from what a step takes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weft.core.prices import Prices

TREE = 0.3
"""Tokens that a tree of k guesses brings grow as k to this power: trees of 1, 3, 7 and 15 guesses (DySpec, 4 deep) brought 0.37,
0.5, 0.8 and 0.9 at temperature 0.8, and of 1, 3 and 7 greedily 0.40, 0.52 and 0.70."""
LAYERS = 0.5
"""A tree's passes of the draft model grow as this power of its guesses: 0.5, 1.0, 1.0 and 1.0 ms for 2, 4, 8 and 15."""
LEAST = 0.02
"""A guess that is less likely to stand is not looked at: it never pays for its row."""


def promising(
    hopes: Sequence[float],
    most: Sequence[int],
    size: int,
    costs: Prices,
    guess_s: float,
    least: float,
    soft: Sequence[bool] = (),
    early: Sequence[bool] = (),
    beside: bool = False,
    trees: Sequence[bool] = (),
) -> tuple[list[int], float]:
    """Guesses for each of some sequences, of `size` that decode, and the tokens a second that they promise: the most; no guesses
    where `least` is not passed, which is given back then.

    hopes: how often guesses stand, 0 for a sequence that is to have none.  most: for each the longest that it may have.  soft:
    whose rows have soft tokens behind them.  early: whose draft writes behind guesses that are not verified yet; beside: while
    they are.  trees: whose guesses stand beside each other, too; their hope is what `gain` makes of it.
    """
    adds: dict[tuple[float, int, bool, bool], list[tuple[float, int]]] = {}
    """What each guess brings and which it is, by all that this is reckoned from: many sequences are hoped the same of."""
    worth: list[tuple[float, int, int]] = []
    for i, a in enumerate(hopes):
        kind = a, most[i], bool(early and early[i]), bool(trees and trees[i])
        if kind not in adds:
            found = ((-_more(a, k, *kind[2:]), k) for k in range(1, most[i] + 1)) if a else ()
            adds[kind] = [(less, k) for less, k in found if less < -LEAST]
        worth += [(less, k, i) for less, k in adds[kind]]
    worth.sort()
    best, chosen, rows_s = least, list[tuple[float, int, int]](), dict[int, float]()
    for longest in range(1, max(most) + 1):
        some = [x for x in worth if x[1] <= longest]
        tokens = list(accumulate((-less for less, _, _ in some), initial=float(size)))
        rows = list(accumulate((2 * k + 1 if soft and soft[i] else 1 for _, k, i in some), initial=size))
        draft_s = guess_s * passes(longest, tree=bool(trees) and all(trees)) + guess_s * any(early)
        taken = 1
        while taken < len(tokens):
            if rows[taken] not in rows_s:
                rows_s[rows[taken]] = costs(rows[taken], beside) or math.inf
            target_s = rows_s[rows[taken]]
            step_s = max(target_s, draft_s) if beside else target_s + draft_s
            if (rate := tokens[taken] / step_s) > best:
                best, chosen = rate, some[:taken]
            elif step_s == math.inf and not beside:
                break  # so many rows have no price, and no more have one
            elif step_s < math.inf:  # more rows never cost less: what could win has more tokens than this
                taken = max(taken, bisect_right(tokens, best * step_s) - 1)
            taken += 1
    wants = [0] * len(hopes)
    for _, k, i in chosen:
        wants[i] = max(wants[i], k)
    return wants, best


def _more(a: float, k: int, early: bool, tree: bool) -> float:
    """What the k-th guess adds to the tokens of a step."""
    if early:
        return alternating(a, k) - alternating(a, k - 1)
    return gain(a, k, tree=tree) - gain(a, k - 1, tree=tree)


def gain(a: float, k: int, *, tree: bool = False) -> float:
    """Tokens of a step beside the one that it brings anyway: a + a^2 + ... + a^k of a chain of k guesses, a k^TREE of a tree."""
    return a * float(k**TREE) if tree else sum(a**j for j in range(1, k + 1))


def passes(k: int, *, tree: bool = False) -> float:
    """What a draft takes for k guesses, in the time of one: a tree is computed layer by layer."""
    return float(k**LAYERS) if tree else float(k)


def alternating(a: float, k: int) -> float:
    """Tokens of a step where k guesses are in hand only if all before them, and the token between, stood (PEARL, 002-50).

    A step that verifies k gives 1 + a + ... + a^k tokens and is followed by another such one with chance a^(k + 1); one that
    verifies none gives 1, and with chance a is followed by one that does.  So x = x a^(k + 1) + (1 - x) a of all steps verify.
    """
    if a <= 0.0:
        return 1.0
    return 1.0 + a / (1.0 + a - a ** (k + 1)) * sum(a**j for j in range(1, k + 1))
