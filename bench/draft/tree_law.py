"""How often one of several guesses for a place should stand: `bench.draft.law` for trees, place by place.

    p the target's law at a place, q the draft's, x1 .. xk the guesses for it, in their order

    race, guesses that are the first k of q's race by the token's own noise    the chance that p's winner is among them
    rejection    x1 stands with min(1, p(x1) / q1(x1)); x2 is weighed so against max(p - q1, 0) normalised, and so on
    k-SEQ        each stands with min(1, p(x) / (r q(x))), r where 1 - (1 - b)^k = r b and b = sum of min(q, p / r); the token
                 that is drawn in place of all, from p - min(q, p / r) (1 - (1 - b)^k) / b, may be one of them again

q1 = q, q2 = q without x1, and so on, where guesses are drawn without replacement (`draft=dyspec`); all are q where they are drawn
alike (`draft=paths`).  Over the draws themselves the mean is taken with noise of numpy's.  How many guesses a tree has for its
first place hangs on the draws as well (`grown`); those behind it are not asked about.

The texts are read by `transformers`, not by weft.  V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.draft.law import TIE, laws
from weft.accept.rejection import STANDS
from weft.core import noise
from weft.exec.ahead import DRAFT
from weft.exec.sampler import CONTENDERS, ERROR, gumbel
from weft.slots import candidates
from weft.types import Plan, StepResult

Law = np.ndarray[Any, np.dtype[np.float64]]
DRAWS = 8
"""Of the guesses for one place."""
MOST = 16
"""Guesses for one place."""


class Place(NamedTuple):
    """Of the output's token at `at`: the guesses for it, what stood there, and whether its step began with it."""

    at: int
    guesses: tuple[int, ...]
    token: int
    first: bool

    @property
    def stood(self) -> bool:
        return self.token in self.guesses


@dataclass(slots=True)
class Places:
    """Places at which guesses were verified, by sequence of the executor."""

    by_sequence: dict[int, list[Place]] = field(default_factory=dict)

    def take(self, plan: Plan, result: StepResult) -> None:
        """Note what a step verified."""
        for work, fact in zip(plan.works, result.works, strict=True):
            if not work.guesses or not fact.tokens:
                continue
            guesses = work.tokens[-work.guesses :]
            parents, after = work.parents or range(-1, work.guesses - 1), [-1]
            mine = self.by_sequence.setdefault(work.request, [])
            for i, token in enumerate(fact.tokens):
                found = candidates(parents, after)
                if not found:
                    break
                mine.append(Place(work.output + i, tuple(guesses[j] for j in found), token, i == 0))
                after = [j for j in found if guesses[j] == token]


def pairs(target: Any, draft: Any, text: Any, temperature: float) -> list[tuple[Law, Law]]:
    """(target's law, draft's law) at each place of (prompt, output, places)."""
    prompt, output, places = text
    at = torch.tensor([len(prompt) - 1 + place.at for place in places])
    both = [laws(model, [*prompt, *output], temperature, at).double().numpy() for model in (target, draft)]
    return [(p / p.sum(), q / q.sum()) for p, q in zip(*both, strict=True)]


# ---------------------------------------------------------------------------------------------- how often


def grown(chances: Law, most: int, threshold: float) -> int:
    """Guesses that DySpec has for its first place, whose draws have these chances in their order: while what is left is worth
    it."""
    left = 1.0
    for k, chance in enumerate(chances[:most]):
        if left < threshold:
            return k
        left -= chance
    return min(most, len(chances))


Count = Callable[[Law], int]
"""How many guesses there are, from the chances of the draws in their order."""


def race(p: Law, q: Law, count: Count, rng: np.random.Generator) -> float:
    """The share of draws of one noise for both whose winner under p is among the first of q's."""
    with np.errstate(divide="ignore"):
        score_p, score_q = np.log(p), np.log(q)
    stood, few = 0, min(MOST, len(p))
    for _ in range(DRAWS):
        g = rng.gumbel(size=len(p))
        raced = score_q + g
        order = np.argpartition(raced, -few)[-few:]
        order = order[np.argsort(-raced[order])]
        # What the tree takes for chances: the race as it is, had the draft's logits so much of an error.
        chances = np.exp((raced - raced.max()) / ERROR)
        k = count((chances / chances.sum())[order])
        stood += int((score_p + g).argmax()) in order[:k]
    return stood / DRAWS


def apart(q: Law, count: Count, rng: np.random.Generator) -> tuple[list[int], list[Law]]:
    """Draws without replacement, and the law of each."""
    with np.errstate(divide="ignore"):
        order = np.argsort(-(np.log(q) + rng.gumbel(size=len(q))))
    tokens, own = [int(x) for x in order[: count(q[order])]], list[Law]()
    left = q.copy()
    for x in tokens:
        own.append(left / left.sum())
        left[x] = 0.0
    return tokens, own


def alike(q: Law, k: int, rng: np.random.Generator) -> tuple[list[int], list[Law]]:
    return rng.choice(len(q), k, p=q).tolist(), [q] * k


def rejection(p: Law, tokens: Sequence[int], own: Sequence[Law]) -> float:
    """The chance that one of these guesses stands."""
    none = 1.0
    for x, q in zip(tokens, own, strict=True):
        none *= 1.0 - min(1.0, p[x] / q[x])
        p = (p - q).clip(min=0.0)
        if p.sum() <= 0.0:
            break
        p = p / p.sum()
    return 1.0 - none


def k_seq(p: Law, tokens: Sequence[int], q: Law) -> float:
    """The chance that one of these draws of q stands, or that the token in place of all is one of them."""
    k = len(tokens)
    low, high = 1.0, float(k)
    for _ in range(40):
        r = (low + high) / 2
        b = float(np.minimum(q, p / r).sum())
        low, high = (low, r) if 1.0 - (1.0 - b) ** k <= r * b else (r, high)
    shared = np.minimum(q, p / high)
    b = float(shared.sum())
    none = float(np.prod([1.0 - min(1.0, p[x] / (high * q[x])) for x in tokens]))
    rest = (p - shared * (1.0 - (1.0 - b) ** k) / b).clip(min=0.0) if b > 0 else p
    again = float(rest[list(set(tokens))].sum() / rest.sum()) if rest.sum() > 0 else 0.0
    return 1.0 - none * (1.0 - again)


# ---------------------------------------------------------------------------------------------- one by one


def slips(
    target: Any,
    draft: Any,
    text: Any,
    seed: int,
    temperature: float,
    *,
    weighs: bool,
    both: list[tuple[Law, Law]] | None = None,
) -> int:
    """Places that are not what their noise makes of the two laws.  Ties within `bench.draft.law.TIE` count for either.

    Under the race: guesses that are not the first of the draft's race in their order, a token that does not win the target's.
    weighs: rejection of guesses that were drawn alike (`draft=paths`): first places, a draw that is not the i-th path's own, one
    that stood and should have fallen, or fell and should have stood.  both: what `pairs` gives, where it is known.
    """
    found = 0
    for place, (p, q) in zip(text[2], both or pairs(target, draft, text, temperature), strict=True):
        if weighs and not place.first:
            continue
        own = [noise.side_seed(seed, DRAFT + 1 + i) for i in range(len(place.guesses))]
        if weighs:
            wrong = any(_wins(q, s, place.at, x) is False for s, x in zip(own, place.guesses, strict=True))
            wrong |= not _weighed(p, q, place, seed)
        else:
            wrong = not _wins(p, seed, place.at, place.token) or not _first(q, seed, place.at, place.guesses)
        found += int(wrong)
    return found


def _scores(law: Law, seed: int, index: int) -> Law:
    with np.errstate(divide="ignore"):
        scores: Law = np.log(law) + gumbel(seed, index, np.arange(len(law)))
    return scores


def _wins(law: Law, seed: int, index: int, token: int) -> bool:
    scores = _scores(law, seed, index)
    return bool(scores[token] >= scores.max() - TIE)


def _first(law: Law, seed: int, index: int, tokens: Sequence[int]) -> bool:
    """Whether these are the first of a law's race, in their order, of the tokens that are looked at."""
    scores = _scores(law, seed, index)
    scores[np.argsort(-law)[CONTENDERS:]] = -np.inf
    best = np.sort(scores)[::-1][: len(tokens)]
    return bool((np.abs(scores[list(tokens)] - best) <= TIE).all())


def _weighed(p: Law, q: Law, place: Place, seed: int) -> bool:
    """Whether what stood is what rejection makes of its noise: the guess that is the first to stand, else no guess."""
    for n, x in enumerate(place.guesses):
        bar = noise.uniform(noise.side_seed(seed, STANDS + 2 * n), place.at, x) * q[x]
        if abs(bar - p[x]) <= TIE * max(p[x], q[x]):
            return True  # too near to tell by two programs
        if bar < p[x]:
            return place.token == x
        p = (p - q).clip(min=0.0)
        p = p / p.sum()
    return not place.stood
