"""What a rule of acceptance does to the law of tokens, place by place, exact and without sampling.

    p         the target's law at a place; q the law that its guess was drawn from
    J(x, y)   the chance that the guess is x and the race selects y.  Both share their noise, so that for x != y
              J(x, y) = q(x) p(y) max(0, F(p(y) / q(y)) - F(p(x) / q(x))),  F(r) = integral from 0 to r of ds / M(s)^2,
              M(s) = sum of max(q(i) s, p(i)), and J(x, x) = 1 / sum of max(q(i) / q(x), p(i) / p(x))
    s(x)      1 where the rule lets a guess x stand although the race selects another token, else 0
    e(y)      J(y, y) + (q(y) - J(y, y)) s(y) + sum over x != y of J(x, y) (1 - s(x)): the law of the token that stands

J is that of exponential clocks with rates p and q over the same noise: with the first rings of x and y at t q(x) s and t p(y),
no other clock rings before them with chance exp(-t M(s)), and t is integrated out.  A rule that weighs laws has guesses drawn by
noise of their own: there J(x, y) = q(x) p(y), and e(y) = q(y) s(y) + p(y) times the sum of q(x) (1 - s(x)).

What a rule does with a guess is found by asking the rule itself, guess by guess.  Along a text whose tokens are set, `Judged`
stands in its place, so that every place of the text is seen: the text is the target's, whatever the rule would have made of it.

Legend.  V: vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.exec.verify import Verified
from weft.slots import Accept

Floats = np.ndarray[Any, np.dtype[np.float64]]
ANOTHER, BEHIND = -2, -3
"""Tokens that are none: the race's where it is not the guess, and what follows."""
UNSEEN = 1e-4
"""Guesses of so little chance together are not asked about, and count as those that fall."""
NOISES = 64
"""How often a rule is asked that wants noise, each time with other noise."""
SPREAD = (2**0.5, 3**0.5, 5**0.5, 7**0.5, 11**0.5)
"""Multiples of these, without their whole part, lie evenly in as many directions: those of a rule's draws."""


class Place:
    """One place with one guess, as the slot `accept` sees it (`slots.Verify`).  turn: of its noise; asked: what of it."""

    def __init__(self, guess: int, law: tuple[Any, Any], q_V: Any, warm: tuple[Any, Any] | None = None) -> None:
        self.guesses: Sequence[int] = [guess]
        self.parents: Sequence[int] = [-1]
        self.laws: Any = q_V
        self._law, self._warm = law, warm or law
        self.turn, self.asked = 0, list[tuple[int, int, int]]()

    def winner(self, row: int) -> int:
        return BEHIND if row else ANOTHER

    def law(self, row: int) -> tuple[Any, Any]:
        return self._law

    def warm(self, row: int) -> tuple[Any, Any]:
        return self._warm

    def uniform(self, row: int, token: int, salt: int) -> float:
        if (row, token, salt) not in self.asked:
            self.asked.append((row, token, salt))
        return (0.5 + self.turn * SPREAD[self.asked.index((row, token, salt)) % len(SPREAD)]) % 1.0


def outcome(rule: Accept, place: Place) -> dict[int, float]:
    """The token that stands and its chance, given the guess and that the race selects `ANOTHER`."""
    found = {rule.accept(place)[0][0]: 1.0}
    if place.asked:
        found = {}
        for i in range(NOISES):
            place.turn = i
            token = rule.accept(place)[0][0]
            found[token] = found.get(token, 0.0) + 1 / NOISES
    return found


@dataclass(frozen=True, slots=True)
class Emitted:
    """law: of the token that stands.  accepted: how often it is the guess.  let: how often a guess stands that the race does not
    select."""

    law: Floats
    accepted: float
    let: float


def emitted(rule: Accept, p_V: Floats, q_V: Floats, *, told: bool = True, warm_V: Floats | None = None) -> Emitted:
    """told: whether the draft tells the law that it draws from.  warm_V: p at temperature 1, where it is certain."""
    ids = np.arange(len(p_V))
    weighed = torch.from_numpy(q_V).float()[None] if rule.laws and told else None
    warm = None if warm_V is None else (ids, warm_V)
    order = np.argsort(-q_V, kind="stable")
    seen = order[: int(np.searchsorted(q_V[order].cumsum(), 1.0 - UNSEEN)) + 1]
    found = {x: outcome(rule, Place(x, (ids, p_V), weighed, warm)) for x in seen[q_V[seen] > 0].tolist()}
    return laid(found, p_V, q_V, apart=rule.laws)


def laid(found: Mapping[int, Mapping[int, float]], p_V: Floats, q_V: Floats, *, apart: bool) -> Emitted:
    """The law from what becomes of each guess where the race selects another token; guesses that are not in `found` fall.

    apart: guesses are drawn by noise of their own.
    """
    stands, falls, more = np.zeros_like(p_V), np.ones_like(p_V), np.zeros_like(p_V)
    both = np.zeros_like(p_V) if apart else same(p_V, q_V)
    off = (q_V - both).clip(min=0.0)
    for x, tokens in found.items():
        stands[x], falls[x] = tokens.get(x, 0.0), tokens.get(ANOTHER, 0.0)
        for token, chance in tokens.items():
            if token not in (x, ANOTHER):
                more[token] += off[x] * chance
    rest = p_V * float(falls @ q_V) if apart else other(p_V, q_V, falls)
    law = both + off * stands + more + rest
    let = float(off @ stands)
    return Emitted(law / law.sum(), float(both.sum()) + let, let)


def same(p_V: Floats, q_V: Floats) -> Floats:
    """J(x, x) for each x: 1 / (sum of q / q(x) where q(i) / q(x) is the larger one, of p / p(x) elsewhere)."""
    at, _ = _order(p_V, q_V)
    out = np.zeros_like(p_V)
    q, p = q_V[at], p_V[at]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = 1.0 / (q.cumsum() / q + (p.sum() - p.cumsum()) / p)
    out[at] = np.where((p > 0) & (q > 0), share, 0.0)
    return out


def other(p_V: Floats, q_V: Floats, share_V: Floats) -> Floats:
    """For each y the sum over x != y of share(x) J(x, y)."""
    at, r = _order(p_V, q_V)
    q, p, weights = q_V[at], p_V[at], share_V[at] * q_V[at]
    mass = q.cumsum()  # M(s) = mass s + left between one ratio and the next
    left = (p.sum() - p.cumsum()).clip(min=0.0)
    reached = np.zeros(len(at))  # F(r)
    finite = int(np.isfinite(r).sum())
    if finite:
        here = r[:finite]
        m = mass[:finite] * here + left[:finite]  # M at each ratio
        steps = np.diff(here, prepend=0.0)
        reached[:finite] = np.cumsum(steps / (np.concatenate([[p.sum()], m[:-1]]) * m))
        reached[finite:] = reached[finite - 1] + 1.0 / (mass[finite - 1] * m[-1])
    before = np.concatenate([[0.0], np.cumsum(weights)[:-1]])
    passed = np.concatenate([[0.0], np.cumsum(weights * np.where(q > 0, reached, 0.0))[:-1]])
    out = np.zeros_like(p_V)
    out[at] = p * (reached * before - passed).clip(min=0.0)
    return out


def _order(p_V: Floats, q_V: Floats) -> tuple[Any, Floats]:
    """(tokens that either law has, by p / q, which is infinite where the draft never guesses one; these ratios)."""
    at = np.flatnonzero((p_V > 0) | (q_V > 0))
    with np.errstate(divide="ignore"):
        r = np.where(q_V[at] > 0, p_V[at] / np.where(q_V[at] > 0, q_V[at], 1.0), np.inf)
    order = np.argsort(r, kind="stable")
    return at[order], r[order]


def divergence(e_V: Floats, p_V: Floats) -> float:
    """KL of e from p in nats: what the text's law gains at this place; over a text these add up."""
    there = e_V > 0
    with np.errstate(divide="ignore"):
        return float(e_V[there] @ (np.log(e_V[there]) - np.log(p_V[there])))


@dataclass(slots=True)
class Judged:
    """In the place of a rule: notes the law that it would give each place, and lets the race decide.

    on: whether it does; else it is the rule itself.  laws: log e [vocab] by (seed of the sequence, index of the token).  let: how
    often in all a guess stood that the race does not select.  lost: of greedy places, by how many nats what stands is less
    likely at temperature 1 than the likeliest token.
    """

    rule: Any
    on: bool = True
    found: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    lost: list[float] = field(default_factory=list)
    let: float = 0.0
    _asked: Any = None

    def __post_init__(self) -> None:
        self._asked = copy.deepcopy(self.rule)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)

    @property
    def laws(self) -> bool:
        return self.on or bool(self.rule.laws)

    def accept(self, view: Verified) -> tuple[list[int], list[int]]:
        if not self.on:
            stood: tuple[list[int], list[int]] = self.rule.accept(view)
            return stood
        tokens, path, at = [view.winner(0)], list[int](), -1
        while True:
            following = [j for j, parent in enumerate(view.parents) if parent == at]
            if following:
                self._note(view, 1 + at, following[0])
            hit = next((j for j in following if view.guesses[j] == tokens[-1]), None)
            if hit is None:
                return tokens, path
            path.append(hit)
            tokens.append(view.winner(1 + hit))
            at = hit

    def _note(self, view: Verified, row: int, guess: int) -> None:
        free = replace(view.rows[row], forced=None)
        alone = Verified([], [], None, [free], view.logits_NV[row : row + 1], [])
        vocab = view.logits_NV.shape[1]
        p_V = _dense(alone.law(0), vocab)
        if view.laws is None:
            q_V = _dense((view.guesses[guess], 1.0), vocab)
        else:
            q_V = view.laws[guess].double().cpu().numpy()
            q_V = q_V / q_V.sum()
        greedy = free.sampling.temperature == 0.0
        warm_V = _dense(alone.warm(0), vocab) if greedy else None
        one = emitted(self._asked, p_V, q_V, told=view.laws is not None, warm_V=warm_V)
        self.let += one.let
        if warm_V is not None:
            self.lost.append(float(np.log(warm_V.max()) - np.log(warm_V[int(one.law.argmax())])))
        with np.errstate(divide="ignore"):
            self.found[free.seed, free.output] = torch.from_numpy(np.log(one.law))


def _dense(law: tuple[Any, Any], vocab: int) -> Floats:
    out = np.zeros(vocab)
    out[law[0]] = law[1]
    return out
