"""Trees of guesses as their law says: the formulas by hand, and the bundled pair within 2 % of what its laws predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from bench.draft import tree_law
from bench.draft.law import reader
from bench.draft.stands import Guessing, made, written
from bench.draft.tree_law import Law, Place, Places, alike, apart, grown, k_seq, pairs, race, rejection, slips
from tests.draft.test_law import OPENINGS
from weft.exec.sampler import ERROR, Row, gumbel, ranked
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve, resolve_draft
from weft.types import SamplingSpec

P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])


def test_weighed_guesses_by_hand() -> None:
    """p = (.5, .3, .2), q = (.2, .2, .6): 2 stands with 1/3; p - q leaves (.3, .1, 0), which is (3/4, 1/4, 0)."""
    assert rejection(P, [2], [Q]) == pytest.approx(1 / 3)
    assert rejection(P, [2, 2], [Q, Q]) == pytest.approx(1 / 3), "what fell has nothing left"
    without = np.array([0.5, 0.5, 0.0])
    assert rejection(P, [2, 1], [Q, without]) == pytest.approx(1 / 3 + 2 / 3 * 1 / 2)
    assert rejection(P, [0], [Q]) == 1.0


def test_k_seq_by_hand() -> None:
    """One guess is weighed as rejection does: r = 1.  Two: b(r) = 1 / (2 r) + .5 below r = 2.5, p / r being (.5, .3, .2) / r."""
    assert k_seq(P, [2], Q) == pytest.approx(1 / 3)
    equal = np.array([0.25, 0.75])
    assert k_seq(equal, [1, 0], equal) == pytest.approx(1.0)
    r = next(
        r
        for r in np.linspace(1, 2, 200_001)
        if 1 - (1 - np.minimum(Q, P / r).sum()) ** 2 <= r * np.minimum(Q, P / r).sum()
    )
    shared = np.minimum(Q, P / r)
    b = shared.sum()
    rest = P - shared * (1 - (1 - b) ** 2) / b
    none = (1 - 0.2 / (r * 0.6)) ** 2
    assert k_seq(P, [2, 2], Q) == pytest.approx(1 - none * (1 - rest[2] / rest.sum()), abs=1e-4)


def test_how_many_a_first_place_gets() -> None:
    """Left before each: 1, .4, .1."""
    chances = np.array([0.6, 0.3, 0.1])
    assert [grown(chances, 8, t) for t in (0.5, 0.4 - 1e-9, 0.2, 0.05)] == [1, 2, 2, 3]
    assert grown(chances, 2, 0.05) == 2


def test_of_one_noise_the_first_of_one_law_and_the_winner_of_the_other() -> None:
    """Among all there is always one; of a law with itself the first is it."""
    rng = np.random.default_rng(1)
    assert race(P, Q, lambda chances: 3, rng) == 1.0
    assert race(P, P, lambda chances: 1, rng) == 1.0
    tokens, own = apart(Q, lambda chances: 3, rng)
    assert sorted(tokens) == [0, 1, 2]
    assert own[-1][tokens[-1]] == pytest.approx(1.0)


def test_chances_of_a_race_are_those_under_an_error_of_the_draft() -> None:
    """The chance of each contender of one race, by 20,000 errors of the logits; greedily the same without noise."""
    logits, rng = torch.tensor([1.0, 0.2, -0.3, 0.8]), np.random.default_rng(2)
    errors = ERROR * rng.gumbel(size=(20_000, 4))
    for temperature, own in ((0.8, gumbel(7, 3, np.arange(4))), (0.0, 0.0)):
        row = Row(SamplingSpec(temperature=temperature), 7, 3, np.array([1]), 1)
        tokens, chances = ranked(logits, row, 4, fair=False)
        raced = logits.double().numpy() / (temperature or 1.0) + own
        assert tokens == np.argsort(-raced).tolist()
        counted = np.bincount((raced + errors).argmax(1), minlength=4) / len(errors)
        assert chances == pytest.approx(counted[tokens], abs=0.012)


Predict = Callable[[Law, Law, np.random.Generator], float]
DYSPEC, PATHS = "draft=dyspec(guesses=6, depth=3, threshold=0.1)", "draft=paths(paths=2, length=2)"
TREE = partial(grown, most=6, threshold=0.1)


def two(chances: Law) -> int:
    return 2


def mean(one: Callable[[], float]) -> float:
    return float(np.mean([one() for _ in range(tree_law.DRAWS)]))


CASES: dict[str, tuple[str, str, Predict]] = {
    "dyspec, race": (DYSPEC, "race", lambda p, q, rng: race(p, q, TREE, rng)),
    "dyspec, rejection": (DYSPEC, "rejection", lambda p, q, rng: mean(lambda: rejection(p, *apart(q, TREE, rng)))),
    "paths, race": (PATHS, "race", lambda p, q, rng: race(p, q, two, rng)),
    "paths, rejection": (PATHS, "rejection", lambda p, q, rng: mean(lambda: rejection(p, *alike(q, 2, rng)))),
    "paths, spectr": (PATHS, "spectr", lambda p, q, rng: mean(lambda: k_seq(p, alike(q, 2, rng)[0], q))),
}  # fmt: skip


def along(draft: str, accept: str, count: int = 24, new: int = 240) -> Sequence[tuple[Any, int]]:
    tokenizer = Tokenizer.load(resolve(None))
    prompts = [tokenizer.encode(text, add_special=False) for text in OPENINGS]
    runtime = made(Guessing("", draft, lambda _: None, accept))
    sampling = SamplingSpec(max_tokens=new, temperature=0.8)
    return written(runtime, [prompts[i % 4] for i in range(count)], range(40, 40 + count), sampling, Places())


SLOW = ("dyspec, race", "dyspec, rejection", "paths, rejection", "paths, spectr")
"""The laws of these are also those of `test_trees.py`, which counts out joint ones of rejection and of SpecTr."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in SLOW else n for n in CASES])
def test_guesses_stand_as_often_as_the_laws_predict(name: str) -> None:
    """At the first places of steps, some 2,900, of which chance alone moves the rate by 0.009; and of each place its noise."""
    draft, accept, predict = CASES[name]
    target, small, rng = reader(resolve(None)), reader(resolve_draft("bundled")), np.random.default_rng(5)
    texts = along(draft, accept)
    stood, predicted, wrong = list[bool](), list[float](), 0
    for text, seed in texts:
        both = pairs(target, small, text, 0.8)
        for place, (p, q) in zip(text[2], both, strict=True):
            if place.first:
                stood.append(place.stood)
                predicted.append(predict(p, q, rng))
        if accept == "race" or name == "paths, rejection":
            wrong += slips(target, small, text, seed, 0.8, weighs=accept != "race", both=both)
    assert len(stood) > 2000
    assert wrong == 0
    assert np.mean(stood) == pytest.approx(np.mean(predicted), abs=0.02)


def test_a_place_that_its_noise_does_not_explain_is_a_slip() -> None:
    """Each place of some, altered: another guess, another order, another token in its place."""
    target, small = reader(resolve(None)), reader(resolve_draft("bundled"))
    ((prompt, output, places), seed), *_ = along(PATHS, "race", 1, 24)
    assert slips(target, small, (prompt, output, places), seed, 0.8, weighs=False) == 0
    several = next(i for i, place in enumerate(places) if len(place.guesses) == 2)
    at, guesses, token, first = places[several]
    for other in (
        Place(at, (guesses[0], guesses[1] ^ 1), token, first),
        Place(at, guesses[::-1], token, first),
        Place(at, guesses, token ^ 1, first),
    ):
        altered = [*places[:several], other, *places[several + 1 :]]
        assert slips(target, small, (prompt, output, altered), seed, 0.8, weighs=False) == 1
