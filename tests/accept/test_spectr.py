"""SpecTr's k-SEQ: by hand, its law in closed form and drawn, and the optimal bound beside it.

Legend.  p: the target's law.  q: the draft's.  k: guesses for one place.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from bench.bound import OUT, Place, accepted, alike, apart, bound, k_seq, rejection, without
from tests.accept.test_rejection import Told
from weft.accept.rejection import Rejection
from weft.accept.spectr import SpecTr, factor, overlap
from weft.conform.law import fit
from weft.slots import Accept

Floats = np.ndarray[Any, np.dtype[np.float64]]
STAND, REST = 1, 2


def test_the_formula_by_hand() -> None:
    """p = (.5, .5), q = (.8, .2), k = 2: b = .5 / r + .2 and 2 - b = r give r^2 - 1.8 r + .5 = 0.

    Then 0 stands with .5 / (.8 r) = .4290 and 1 always; where none does, .5 - r min(q, p / r) leaves 1 alone.
    """
    p, q = np.array([0.5, 0.5]), np.array([0.8, 0.2])
    r = (1.8 + math.sqrt(1.24)) / 2
    assert factor(p, q, 2) == pytest.approx(r, abs=1e-8)
    assert overlap(p, q, r)[1] == pytest.approx(2 - r)
    told = [{0: 0.5, 1: 0.5}, {0: 1.0}, {0: 1.0}]

    def stands(guesses: list[int], noise: dict[tuple[int, int, int], float]) -> tuple[list[int], list[int]]:
        view = Told(guesses, told, [q.tolist()] * 2, noise, parents=[-1, -1])
        return SpecTr().accept(view)

    assert stands([0, 0], {(0, 0, STAND): 0.428}) == ([0, 71], [0])
    assert stands([0, 0], {(0, 0, STAND): 0.430, (0, 0, STAND + 2): 0.428}) == ([0, 71], [0])
    assert stands([0, 1], {(0, 0, STAND): 0.430, (0, 1, STAND + 2): 0.999}) == ([1, 72], [1])
    assert stands([0, 0], {(0, 0, STAND): 0.430, (0, 0, STAND + 2): 0.430, (0, 0, REST): 0.01}) == ([1], [])


def test_one_guess_is_weighed_as_rejection_does() -> None:
    """So is one without a law, and one of siblings that were drawn from other laws."""
    q, p = [[0.5, 0.3, 0.2, 0.0]], [{0: 0.2, 1: 0.3, 2: 0.1, 3: 0.4}, {0: 1.0}, {0: 1.0}]
    for u, rest in itertools.product((0.39, 0.41), (0.2, 0.9)):
        noise = {(0, 0, STAND): u, (0, 0, REST): rest}
        wanted = Rejection().accept(Told([0], p, q, noise))
        assert SpecTr().accept(Told([0], p, q, noise)) == wanted
        apart_ = [*q, [0.0, 0.6, 0.4, 0.0]]
        assert SpecTr().accept(Told([0, 1], p, apart_, noise, parents=[-1, -1])) == wanted
    certain = {(0, 1, STAND): 0.31, (0, 0, REST): 0.1}
    assert SpecTr().accept(Told([1, 2], p, None, certain, parents=[-1, -1])) == ([0], [])


def random_pair(rng: np.random.Generator, vocab: int, sharp: float) -> tuple[Floats, Floats]:
    x = sharp * rng.standard_normal(vocab)
    y = x + rng.choice([0.3, 1.0, 2.0]) * rng.standard_normal(vocab)
    p, q = np.exp(x), np.exp(y)
    return p / p.sum(), q / q.sum()


def test_the_law_in_closed_form_is_the_target_s() -> None:
    """And k-SEQ accepts at least 1 - 1/e of what the best rule does, and never more."""
    rng = np.random.default_rng(1)
    for _ in range(500):
        p, q = random_pair(rng, 50, rng.choice([0.5, 2.0]))
        for k in (1, 2, 3, 5, 8):
            r = factor(p, q, k)
            shared, b = overlap(p, q, r)
            all_fall = (1 - b) ** k
            rest = p - shared * (1 - all_fall) / b
            assert rest.min() >= -1e-12, "what is drawn in place of all is a law"
            assert rest.sum() == pytest.approx(all_fall, abs=1e-12)
            best = bound(p, q, k)
            assert (1 - 1 / math.e) * best - 1e-12 <= 1 - all_fall <= best + 1e-12


UNITS = 1 << 40
"""Probabilities as whole numbers, for an exact flow."""


def best_by_flow(p: Floats, q: Floats, n: int) -> float:
    """The most that any plan accepts: a flow from all draws of n guesses, through the guesses of each, to the target's tokens."""
    nx = pytest.importorskip("networkx")
    graph = nx.DiGraph()
    for draw in itertools.product(range(len(q)), repeat=n):
        graph.add_edge("draws", draw, capacity=round(UNITS * float(np.prod(q[list(draw)]))))
        for token in draw:
            graph.add_edge(draw, token, capacity=UNITS)
    for token, chance in enumerate(p.tolist()):
        graph.add_edge(token, "tokens", capacity=round(UNITS * chance))
    return float(nx.maximum_flow_value(graph, "draws", "tokens") / UNITS)


def test_the_bound_is_the_greatest_flow() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        for vocab, n in ((3, 2), (4, 3), (5, 2)):
            p, q = random_pair(rng, vocab, 1.5)
            assert bound(p, q, n) == pytest.approx(best_by_flow(p, q, n), abs=1e-8)


def test_the_bound_by_hand() -> None:
    """Two guesses of (.8, .2) for (.5, .5): both are 0 with .64, and 0 may be said with .5 only."""
    assert bound(np.array([0.5, 0.5]), np.array([0.8, 0.2]), 2) == pytest.approx(0.86)
    assert bound(np.array([0.5, 0.5]), np.array([0.8, 0.2]), 1) == pytest.approx(0.7)


DRAWS = 6_000
RULES: list[tuple[Accept, Any]] = [(SpecTr(), alike), (Rejection(), alike), (Rejection(), apart), (SpecTr(), apart)]


def first_tokens(rule: Accept, draws: Any, p: Floats, q: Floats, k: int, count: int) -> list[int]:
    rng = np.random.default_rng(5)
    return [rule.accept(Place(*draws(q, k, rng), p, seed))[0][0] for seed in range(count)]


@pytest.mark.parametrize(("rule", "draws"), RULES, ids=["spectr", "rejection", "apart", "spectr of others"])
def test_the_law_of_several_guesses_is_the_target_s(rule: Accept, draws: Any) -> None:
    p, q = random_pair(np.random.default_rng(4), 8, 1.0)
    found = first_tokens(rule, draws, p, q, 3, DRAWS)
    assert fit(found, dict(enumerate(p.tolist()))).ok


def test_a_rule_that_forgets_what_fell_is_seen() -> None:
    """A copy that weighs every sibling against the whole law, and one whose draws are taken to be alike and are not."""

    class Forgets(Rejection):
        def _weigh(self, view: Any, row: int, found: Sequence[int]) -> int:
            token = 0
            for j in found:
                token = super()._weigh(view, row, [j])
                if token == view.guesses[j]:
                    return token
            return token

    class Blind(Place):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.laws = torch.stack([self.laws[0]] * len(self.laws))

    p, q = random_pair(np.random.default_rng(4), 8, 1.0)
    wanted, rng = dict(enumerate(p.tolist())), np.random.default_rng(5)
    assert not fit(first_tokens(Forgets(), alike, p, q, 3, DRAWS), wanted).ok
    blind = [SpecTr().accept(Blind(*apart(q, 3, rng), p, seed))[0][0] for seed in range(DRAWS)]
    assert not fit(blind, wanted).ok


def test_more_guesses_stand_as_the_closed_form_says() -> None:
    """Within 2 % of it: k-SEQ's 1 - (1 - b)^k, and rejection's chain of what is left."""
    p, q = random_pair(np.random.default_rng(7), 12, 1.2)
    for k in (1, 2, 4):
        rng = np.random.default_rng(k)
        b = overlap(p, q, factor(p, q, k))[1]
        assert accepted(SpecTr(), p, q, k, "alike", 4000, rng) == pytest.approx(1 - (1 - b) ** k, abs=0.02)
        left, falls = p, 1.0
        for _ in range(k):
            falls *= 1 - float(np.minimum(left, q).sum())
            left = np.maximum(left - q, 0) / np.maximum(left - q, 0).sum()
        assert accepted(Rejection(), p, q, k, "alike", 4000, rng) == pytest.approx(1 - falls, abs=0.02)
        assert k_seq(p, q, k, rng) == pytest.approx(1 - (1 - b) ** k)
        assert rejection(p, q, k, rng) == pytest.approx(1 - falls)
        assert max(k_seq(p, q, k, rng), 1 - falls) <= bound(p, q, k) + 1e-12


@pytest.mark.parametrize("k", [1, 2, 3])
def test_guesses_drawn_without_replacement_stand_as_counted_out(k: int) -> None:
    """Over every order of k of six tokens: how likely it is drawn, times what rejection makes of it."""
    p, q = random_pair(np.random.default_rng(9), 6, 1.2)
    wanted = 0.0
    for tokens in itertools.permutations(range(6), k):
        drawn, none, own, law = 1.0, 1.0, p, q
        for x in tokens:
            drawn *= law[x]
            none *= 1 - min(1.0, own[x] / law[x])
            left = np.maximum(own - law, 0)
            own, law = left / left.sum() if left.sum() > 0 else own, np.where(np.arange(6) == x, 0, law)
            law = law / law.sum()
        wanted += drawn * (1 - none)
    found = np.mean([without(p, q, k, np.random.default_rng(seed)) for seed in range(40)])
    assert found == pytest.approx(wanted, abs=1e-12 if k == 1 else 0.003)
    rng = np.random.default_rng(k)
    assert accepted(Rejection(), p, q, k, "without replacement", 4000, rng) == pytest.approx(wanted, abs=0.02)


def test_in_the_record_no_rule_accepts_more_than_any_could() -> None:
    """Of guesses drawn alike; one guess is weighed by all of them as well as can be."""
    rows = json.loads(OUT.read_text())["rows"]
    assert [(row["temperature"], row["guesses"]) for row in rows] == [(t, k) for t in (0.8, 1.0) for k in (1, 2, 4)]
    for row in rows:
        assert row["contexts"] == 128
        assert max(row["spectr"], row["rejection"]) <= row["bound"] + 1e-6
        if row["guesses"] == 1:
            found = [row[name] for name in ("spectr", "rejection", "rejection, without replacement")]
            assert found == pytest.approx([row["bound"]] * 3, abs=1e-5)
