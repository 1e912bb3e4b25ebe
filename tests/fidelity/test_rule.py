"""What a rule of acceptance does to the law of tokens: by hand, against draws of the race's noise, and on rules that keep it.

Legend.  p: the target's law.  q: the draft's.  V: vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from weft.accept.bild import BiLD
from weft.accept.rejection import Rejection
from weft.accept.typical import Typical
from weft.conform.law import fit
from weft.fidelity import rule as r
from weft.slots import Verify

Floats = np.ndarray[Any, np.dtype[np.float64]]
V, DRAWS = 9, 200_000
STRICT = Typical(epsilon=1.0, delta=99.0)
"""Lets nothing stand but what the race selects."""


class Lets:
    """Lets these guesses stand, whatever the race selects."""

    laws = False

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens

    def accept(self, view: Verify) -> tuple[list[int], list[int]]:
        winner, guess = view.winner(0), view.guesses[0]
        return ([guess, view.winner(1)], [0]) if guess in (winner, *self.tokens) else ([winner], [])


def two(seed: int) -> tuple[Floats, Floats]:
    """A pair of laws; some tokens have no chance under one, the other, or both."""
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(V, 0.6)), rng.dirichlet(np.full(V, 0.6))
    p[seed % V], q[(seed + 2) % V], p[(seed + 4) % V], q[(seed + 4) % V] = 0, 0, 0, 0
    return p / p.sum(), q / q.sum()


def raced(p: Floats, q: Floats, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(guesses, what the race selects) by exponential clocks over the same noise."""
    rings = -np.log1p(-np.random.default_rng(seed).random((DRAWS, V)))
    with np.errstate(divide="ignore"):
        return (rings / q).argmin(1), (rings / p).argmin(1)


def test_two_tokens_by_hand() -> None:
    """p = (.6, .4), q = (.3, .7): both are 0 with 1 / (1 + .7 / .3) = .3, both 1 with 1 / (.6 / .4 + 1) = .4, else 1 and 0."""
    p, q = np.array([0.6, 0.4]), np.array([0.3, 0.7])
    assert r.same(p, q) == pytest.approx([0.3, 0.4])
    assert r.other(p, q, np.ones(2)) == pytest.approx([0.3, 0.0])
    found = r.emitted(Lets(1), p, q)
    assert found.law == pytest.approx([0.3, 0.7])
    assert (found.accepted, found.let) == pytest.approx((1.0, 0.3))
    assert r.emitted(Lets(0), p, q).law == pytest.approx(p)


@pytest.mark.parametrize("seed", range(4))
def test_the_law_is_that_of_draws(seed: int) -> None:
    p, q = two(seed)
    guesses, winners = raced(p, q, seed)
    assert r.same(p, q) == pytest.approx(
        [((guesses == x) & (winners == x)).mean() for x in range(V)], abs=4 / math.sqrt(DRAWS)
    )
    for lets in ((0,), (1, 3), (2, 5, 6, 7), tuple(range(V))):
        stands = np.where(np.isin(guesses, lets), guesses, winners)
        found = r.emitted(Lets(*lets), p, q)
        assert fit(stands.tolist(), {i: float(x) for i, x in enumerate(found.law) if x > 0}).ok
        agree = (guesses == winners) | np.isin(guesses, lets)
        assert found.accepted == pytest.approx(agree.mean(), abs=4 / math.sqrt(DRAWS))
        assert found.let == pytest.approx((agree & (guesses != winners)).mean(), abs=4 / math.sqrt(DRAWS))


@pytest.mark.parametrize("seed", range(4))
def test_rules_that_keep_the_law_are_found_to(seed: int) -> None:
    """The race to the last bit; rejection, whose noise is asked at a few values, to within these."""
    p, q = two(seed)
    assert r.emitted(STRICT, p, q).law == pytest.approx(p, abs=1e-12)
    assert r.emitted(Rejection(), p, q).law == pytest.approx(p, abs=3.0 / r.NOISES)
    assert r.divergence(r.emitted(Rejection(), p, q).law, p) < 0.02
    assert r.emitted(Rejection(), p, q).accepted == pytest.approx(np.minimum(p, q).sum(), abs=3.0 / r.NOISES)
    certain = np.eye(V)[int(p.argmax())]
    assert r.emitted(STRICT, p, certain, told=False).law == pytest.approx(p, abs=1e-12)


def test_guesses_of_their_own_noise() -> None:
    """Where a rule weighs laws, what falls is a draw of p: e = q s + p times what falls."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])

    class Apart(Lets):
        laws = True

    found = r.emitted(Apart(2), p, q)
    assert found.law == pytest.approx([0.4 * 0.5, 0.4 * 0.3, 0.6 + 0.4 * 0.2])


def test_a_certain_guess() -> None:
    """It stands for sure where it is let, and the text has no more surprise than -log p there."""
    p = np.array([0.5, 0.3, 0.2])
    found = r.emitted(Typical(epsilon=0.25), p, np.eye(3)[1], told=False)
    assert found.law == pytest.approx([0, 1, 0])
    assert r.divergence(found.law, p) == pytest.approx(-math.log(0.3))
    assert found.let == pytest.approx(0.7)
    assert r.emitted(BiLD(rollback=1.0), p, np.eye(3)[1], told=False).law == pytest.approx(p)


def test_a_divergence_by_hand() -> None:
    e, p = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.5, 0.25])
    assert r.divergence(e, p) == pytest.approx(0.5 * math.log(2))
    assert r.divergence(np.array([0.5, 0.5]), np.array([1.0, 0.0])) == math.inf


def test_a_guess_that_is_not_asked_about_falls() -> None:
    q = np.array([1 - r.UNSEEN / 2, r.UNSEEN / 2])
    p = np.array([0.5, 0.5])
    assert r.emitted(Lets(0, 1), p, q).law == pytest.approx(r.emitted(Lets(0), p, q).law)


def test_the_rule_is_asked_with_the_law_at_temperature_1_where_it_is_certain() -> None:
    p, warm = np.array([1.0, 0.0]), np.array([0.6, 0.4])
    found = r.emitted(BiLD(rollback=1.0), p, np.array([0.0, 1.0]), warm_V=warm)
    assert found.law == pytest.approx([0, 1])
    assert r.emitted(BiLD(rollback=0.9), p, np.array([0.0, 1.0]), warm_V=warm).law == pytest.approx([1, 0])


def test_laws_are_handed_to_a_rule_that_weighs_them() -> None:
    seen: list[Any] = []

    class Looks(Lets):
        def accept(self, view: Verify) -> tuple[list[int], list[int]]:
            seen.append(view.laws)
            return super().accept(view)

    rule = Looks()
    r.emitted(rule, np.array([0.5, 0.5]), np.array([0.25, 0.75]))
    rule.laws = True  # type: ignore[misc]
    r.emitted(rule, np.array([0.5, 0.5]), np.array([0.25, 0.75]))
    r.emitted(rule, np.array([0.5, 0.5]), np.array([0.0, 1.0]), told=False)
    assert seen[:2] == [None, None]
    assert torch.equal(seen[2], torch.tensor([[0.25, 0.75]]))
    assert seen[-1] is None
