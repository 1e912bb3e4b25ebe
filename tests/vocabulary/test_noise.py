"""The noise of requests: a bijection, the right distributions, and no likeness between neighbours.

Seeds are fixed, so nothing here is left to chance; the bounds are those that a fair source misses once in a thousand or less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from weft.core.noise import (
    GOLDEN,
    MASK,
    MULTIPLY_1,
    MULTIPLY_2,
    child_seed,
    gumbel,
    mix,
    row_key,
    uniform,
)

SEEDS = [0, 1, 2, 42, 1 << 63, MASK]
SAMPLES = [0, 1, 2, MASK, 1 << 63, GOLDEN, *(pow(3, i, 1 << 64) for i in range(1, 3000))]
COUNT = 4000
SIGMAS = 4.0
"""Bound of a standard normal statistic: missed by a fair source once in 16,000."""


def unshift(y: int, by: int) -> int:
    """The x of y = x ^ (x >> by)."""
    x = y
    for _ in range(64 // by + 1):
        x = y ^ (x >> by)
    return x


def unmix(y: int) -> int:
    y = unshift(y, 31)
    y = unshift((y * pow(MULTIPLY_2, -1, 1 << 64)) & MASK, 27)
    return unshift((y * pow(MULTIPLY_1, -1, 1 << 64)) & MASK, 30)


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's r in its standard deviations under independence."""
    return float(np.corrcoef(a, b)[0, 1]) * math.sqrt(len(a))


def misfit(counts: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square in standard deviations above its mean (normal approximation)."""
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def distance(values: Sequence[float], law: Sequence[float]) -> float:
    """Kolmogorov-Smirnov's D times sqrt(n), of sorted values whose distribution function there is `law`."""
    n = len(values)
    at = np.arange(n)
    cdf = np.asarray(law)
    return float(max((cdf - at / n).max(), ((at + 1) / n - cdf).max())) * math.sqrt(n)


def test_mix_is_undone_by_its_inverse() -> None:
    assert all(unmix(mix(x)) == x for x in SAMPLES)
    assert all(mix(unmix(x)) == x for x in SAMPLES)
    assert all(0 <= mix(x) <= MASK for x in SAMPLES)


def test_mix_wraps_at_64_bits() -> None:
    assert all(mix(x + (1 << 64)) == mix(x) for x in SAMPLES[:50])
    assert mix(-1) == mix(MASK)


def test_mix_is_splitmix64() -> None:
    """The first outputs of SplitMix64 under 0 and under 1234567, as other implementations print them."""
    assert mix(GOLDEN) == 0xE220A8397B1DCDAF
    assert [mix(1234567 + i * GOLDEN) for i in (1, 2, 3, 4, 5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_one_bit_in_changes_half_of_the_bits_out() -> None:
    flips = [(mix(x) ^ mix(x ^ (1 << bit))).bit_count() for x in SAMPLES[5:105] for bit in range(64)]
    assert abs(sum(flips) / len(flips) - 32) < SIGMAS * 4 / math.sqrt(len(flips))


@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_is_uniform(seed: int) -> None:
    for values in (
        [uniform(seed, 0, t) for t in range(COUNT)],
        [uniform(seed, i, 7) for i in range(COUNT)],
        [uniform(seed + s, 3, 11) for s in range(COUNT)],
    ):
        assert min(values) > 0
        assert max(values) < 1
        assert distance(sorted(values), sorted(values)) < 1.95
        counts, _ = np.histogram(values, bins=64, range=(0, 1))
        assert misfit(counts, np.full(64, COUNT / 64)) < SIGMAS


@pytest.mark.parametrize("seed", SEEDS)
def test_gumbel_is_gumbel(seed: int) -> None:
    values = sorted(gumbel(seed, i, t) for i in range(20) for t in range(COUNT // 20))
    assert distance(values, [math.exp(-math.exp(-v)) for v in values]) < 1.95
    assert abs(np.mean(values) - 0.5772156649) < SIGMAS * math.pi / math.sqrt(6 * COUNT)


def test_gumbel_stays_finite_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 bits, the smallest and the largest that can come."""
    for bits in (0, (1 << 32) - 1):
        monkeypatch.setattr("weft.core.noise.mix", lambda x, b=bits: b << 32)
        assert 0 < uniform(0, 0, 0) < 1
        assert math.isfinite(gumbel(0, 0, 0))


def test_the_race_draws_from_the_softmax() -> None:
    logits = [0.0, 1.0, -1.0, 2.0, 0.5, -3.0]
    weights = np.exp(logits)
    won = [max(range(6), key=lambda t, i=i: logits[t] + gumbel(5, i, t)) for i in range(COUNT)]
    assert misfit(np.bincount(won, minlength=6), weights / weights.sum() * COUNT) < SIGMAS


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lag", [1, 2, 3, 64])
def test_neighbours_are_independent(seed: int, lag: int) -> None:
    here = [uniform(seed, 5, t) for t in range(COUNT)]
    assert abs(correlation(here, [uniform(seed, 5 + lag, t) for t in range(COUNT)])) < SIGMAS  # the next output index
    assert abs(correlation(here[:-lag], here[lag:])) < SIGMAS  # the next token
    assert abs(correlation(here, [uniform(seed + lag, 5, t) for t in range(COUNT)])) < SIGMAS  # the next seed
    child = child_seed(seed, lag)
    assert abs(correlation(here, [uniform(child, 5, t) for t in range(COUNT)])) < SIGMAS  # the next sequence
    line = [uniform(seed, i, 9) for i in range(COUNT)]
    assert abs(correlation(line[:-lag], line[lag:])) < SIGMAS
    assert abs(correlation(line, [uniform(seed, i, 9 + lag) for i in range(COUNT)])) < SIGMAS


@pytest.mark.parametrize("seed", SEEDS)
def test_pairs_fill_the_square_evenly(seed: int) -> None:
    """What correlation does not see: neighbours in an 8 x 8 table."""
    rows = np.array([[uniform(seed, i, t) for t in range(64)] for i in range(128)])
    for a, b in ((rows[:-1], rows[1:]), (rows[:, :-1], rows[:, 1:]), (rows[:-1, :-1], rows[1:, 1:])):
        table, _, _ = np.histogram2d(a.ravel(), b.ravel(), bins=8, range=((0, 1), (0, 1)))
        assert misfit(table.ravel(), np.full(64, a.size / 64)) < SIGMAS


def test_no_two_places_share_their_noise() -> None:
    """Seeds count up from 0 in practice, and so do output indices: (seed, index + 1) must not be (seed + 1, index)."""
    keys = {row_key(seed, index) for seed in range(150) for index in range(150)}
    assert len(keys) == 150 * 150
    draws = {(uniform(s, i, t), uniform(s, i, t + 1)) for s in range(20) for i in range(20) for t in range(20)}
    assert len(draws) == 8000


def test_the_first_sequence_keeps_the_seed() -> None:
    assert [child_seed(s, 0) for s in SEEDS] == SEEDS
    assert child_seed(-1, 0) == MASK


def test_every_sequence_has_a_seed_of_its_own() -> None:
    """Of a hundred requests of 128 sequences with neighbouring seeds, no two sequences share one, nor do negative seeds."""
    children = [child_seed(seed, i) for seed in range(-50, 50) for i in range(128)]
    assert len(set(children)) == len(children)
    assert all(0 <= c <= MASK for c in children)


def test_seeds_are_taken_modulo_2_to_the_64() -> None:
    for seed in (-1, -5, -(1 << 63)):
        assert uniform(seed, 3, 4) == uniform(seed & MASK, 3, 4)
        assert child_seed(seed, 2) == child_seed(seed & MASK, 2)
