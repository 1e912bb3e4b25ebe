"""What rows cost, by hand: where they were seen, between and beyond, and what one size of batch learns from others."""

from __future__ import annotations

import random

import pytest

from weft.core.lengths import LEAST, promising
from weft.core.prices import Costs, Prices

MS = 1e-3


def costs_of(*seen: tuple[int, float]) -> Costs:
    costs = Costs()
    for rows, ms in seen:
        costs.add(rows, ms * MS)
    return costs


def test_a_few_rows_more_are_priced_as_what_they_are() -> None:
    """34 rows are of the class of 33 to 40: were they taken for 40, a row would seem to cost a fifth of what it does."""
    costs = costs_of((32, 30.0), (34, 31.2))
    assert costs.known == [32, 40]
    assert costs(33) == pytest.approx(30.6 * MS)
    assert costs(34) == pytest.approx(31.2 * MS)
    # Two rows apart tell nothing of a row's cost: it is thought to be 0.6 of what one of those 34 costs.
    assert costs(40) == pytest.approx((31.2 + 6 * 0.6 * 31.2 / 34) * MS)


def test_a_class_lies_where_its_rows_were() -> None:
    costs = costs_of((17, 20.0), (19, 20.0), (32, 33.0))
    assert costs(25) == pytest.approx((20 + 13 * 7 / 14) * MS)


def test_a_row_beyond_is_priced_by_numbers_of_rows_that_lie_apart() -> None:
    """From 16 to 32 a row costs 0.8 ms; 28 and 32 lie too near each other to say so, and 1 says what few rows cost."""
    costs = costs_of((1, 17.0), (16, 20.0), (28, 33.0), (32, 32.8))
    assert costs(40) == pytest.approx((33.0 + 8 * (33.0 - 20.0) / 16) * MS)


@pytest.mark.parametrize(("seen", "most"), [(1, 10), (4, 10), (8, 12), (16, 24), (32, 48)])
def test_many_more_rows_than_were_seen_have_no_price(seen: int, most: int) -> None:
    costs = costs_of((seen, 17.0))
    assert costs(most) is not None
    assert costs(most + 1) is None


def test_a_batch_learns_from_batches_of_other_sizes() -> None:
    """Steps of all took 16, 20 and 32 ms for 8, 16 and 32 rows; those of 8 long sequences take 24 for their 8 rows."""
    every, own = costs_of((8, 16.0), (16, 20.0), (32, 32.0)), costs_of((8, 24.0))
    prices = Prices(own, every)
    assert prices(8) == pytest.approx(24 * MS)
    assert prices(16) == pytest.approx(24 * 20 / 16 * MS)
    assert prices(24) == pytest.approx(24 * 26 / 16 * MS)
    own.add(16, 28 * MS)
    assert prices(12) == pytest.approx(26 * MS)  # what it has seen itself goes first
    assert prices(32) == pytest.approx(28 * 32 / 20 * MS)


def test_a_size_that_was_never_seen_goes_by_the_others() -> None:
    prices = Prices(Costs(), costs_of((1, 15.0), (8, 16.0), (16, 20.0)))
    assert prices(12) == pytest.approx(18 * MS)
    assert prices(30) is None
    assert Prices(Costs(), costs_of((8, 16.0)))(4) is None  # fewer rows than anybody has seen
    assert Prices(Costs(), Costs())(1) is None


def test_how_long_ago_a_number_of_rows_was_seen_or_looked_for() -> None:
    costs = costs_of((8, 16.0), *[(16, 20.0)] * 5)
    assert (costs.since(8), costs.since(16), costs.since(1)) == (5, 0, 6)
    costs.looked = 4
    assert (costs.since(8), costs.since(1)) == (2, 2)


def test_guessing_that_did_not_keep_its_promise_is_left_alone_each_time_for_longer() -> None:
    """Four sequences: plain steps take 20 ms, those with guesses 30 and bring 6 tokens: 6 / 30 * 20 / 4 = 1.0 of plain's."""
    costs = costs_of((4, 20.0))
    costs.plain_s.add(20 * MS)
    for wait in (64, 128, 256, 512, 1024, 1024):
        for _ in range(7):
            costs.tokens.add(6)
            costs.seconds.add(30 * MS)
        assert costs.kept(4, 1.06)  # not tried for long enough
        costs.tokens.add(6)
        costs.seconds.add(30 * MS)
        assert not costs.kept(4, 1.06)
        costs.steps += wait - 1
        assert not costs.kept(4, 1.06)
        costs.steps += 1
        assert costs.kept(4, 1.06)
    for _ in range(64):
        costs.tokens.add(7)
        costs.seconds.add(30 * MS)  # 1.17
    assert costs.kept(4, 1.06)
    assert costs.patience == 64


@pytest.mark.parametrize("seed", range(40))
def test_of_all_guesses_in_the_order_of_their_worth_as_many_are_taken_as_promise_most(seed: int) -> None:
    """Every longest length and every number of guesses, one after the other; most of them are left out where it is decided."""
    rnd = random.Random(seed)
    size, guess_s = rnd.choice((1, 3, 8, 16)), rnd.choice((0.0, 0.5 * MS))
    costs = Costs()
    for rows in range(size, 3 * size + 2, rnd.choice((1, 3))):
        costs.add(rows, (10 + rnd.choice((0.05, 0.4)) * rows) * MS)
    hopes = [rnd.choice((0.0, 0.3, rnd.random())) for _ in range(size)]
    most = [rnd.choice((1, 4, 8)) for _ in range(size)]
    prices = Prices(costs, costs)
    found, least = [0] * size, 1.05 * size / (prices(size) or 1.0)
    best = least
    for longest in range(1, 9):
        worth = sorted(
            (-(a**k), k, i) for i, a in enumerate(hopes) for k in range(1, min(longest, most[i]) + 1) if a**k > LEAST
        )
        for n in range(1, len(worth) + 1):
            step_s = prices(size + n)
            rate = 0.0 if step_s is None else (size - sum(x for x, _, _ in worth[:n])) / (step_s + longest * guess_s)
            if rate > best * (1 + 1e-12):
                best, found = rate, [sum(j == i for _, _, j in worth[:n]) for i in range(size)]
    chosen, rate = promising(hopes, most, size, prices, guess_s, least)
    assert rate == pytest.approx(best, rel=1e-9)
    assert chosen == found
