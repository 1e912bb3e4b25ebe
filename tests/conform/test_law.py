"""The chi-square test against figures from a table, and against simulation."""

from __future__ import annotations

import random

import pytest

from weft.conform import law

DIE = dict.fromkeys(range(6), 1 / 6)


@pytest.mark.parametrize(
    ("freedom", "chi2", "p"),
    [(1, 3.841, 0.05), (1, 6.635, 0.01), (5, 11.070, 0.05), (10, 18.307, 0.05), (30, 50.892, 0.01)],
)
def test_tail_probabilities_are_the_tables(freedom: int, chi2: float, p: float) -> None:
    """Critical values of the chi-square distribution, NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.4."""
    assert law.survival(chi2, freedom) == pytest.approx(p, rel=2e-3)
    assert law.critical(freedom, p) == pytest.approx(chi2, rel=1e-3)


def test_the_statistic_by_hand() -> None:
    drawn = [0] * 8 + [1] * 12 + [2] * 10
    found = law.fit(drawn, {0: 1 / 3, 1: 1 / 3, 2: 1 / 3})
    assert found.chi2 == pytest.approx((4 + 4 + 0) / 10)
    assert found.freedom == 2


def test_what_the_law_never_gives_fails_at_once() -> None:
    assert not law.fit([0, 0, 7], DIE).ok
    assert not law.fit([0, 0, 1], {0: 1.0, 1: 0.0}).ok


def test_rare_cells_are_put_together() -> None:
    wanted = {0: 0.9, **dict.fromkeys(range(1, 11), 0.01)}
    rnd = random.Random(1)
    drawn = rnd.choices(list(wanted), list(wanted.values()), k=100)
    assert law.fit(drawn, wanted).freedom < 5


def test_two_samples_by_hand() -> None:
    """A 2 by 2 table: chi2 = N (ad - bc)^2 / (row and column sums multiplied)."""
    one, other = [0] * 30 + [1] * 10, [0] * 40 + [1] * 20
    found = law.alike(one, other)
    assert found.chi2 == pytest.approx(100 * (30 * 20 - 10 * 40) ** 2 / (40 * 60 * 70 * 30))
    assert found.freedom == 1


def test_two_samples_of_one_law_pass_and_of_two_laws_fail() -> None:
    rnd = random.Random(3)
    same = [law.alike(rnd.choices(range(6), k=600), rnd.choices(range(6), k=300)).p for _ in range(200)]
    assert sum(p <= 0.05 for p in same) == pytest.approx(10, abs=9)
    assert not law.alike(rnd.choices(range(6), k=600), rnd.choices(range(5), k=600)).ok
    assert law.alike([1] * 20, [1] * 20).ok


def test_an_exact_sampler_passes_as_often_as_stated_and_a_biased_one_fails_as_often() -> None:
    rnd = random.Random(2)
    biased = {i: 1 / 6 + (0.03 if i == 0 else -0.006) for i in range(6)}
    draws = 4000
    exact = [law.fit(rnd.choices(list(DIE), k=draws), DIE).p for _ in range(200)]
    assert sum(p <= 0.05 for p in exact) == pytest.approx(10, abs=9)
    strength = law.power(DIE, biased, draws)
    seen = sum(not law.fit(rnd.choices(list(biased), list(biased.values()), k=draws), DIE).ok for _ in range(200)) / 200
    assert 0.5 < strength < 1.0
    assert seen == pytest.approx(strength, abs=0.12)
