"""Rules that give up the law: Medusa's typical acceptance and Big Little Decoder's rollback, by hand and live."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.bound import given_up
from tests.accept.test_rejection import Told
from tests.exec.conftest import STORY, Bench, spec
from weft.accept.big_little import BigLittle
from weft.accept.typical import Typical
from weft.errors import ConfigError
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.registry import parse

EVEN = {1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25}


def test_the_threshold_by_hand() -> None:
    """Of four equal tokens the entropy is ln 4, so delta = .3 asks for more than .3 / 4; of a certain one for epsilon."""
    assert Typical().threshold(np.array([0.25] * 4)) == pytest.approx(0.075)
    assert Typical().threshold(np.array([1.0, 0.0])) == pytest.approx(0.09)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert Typical(epsilon=1.0, delta=0.5).threshold(np.array([0.9, 0.1])) == pytest.approx(0.5 * math.exp(-entropy))


def test_typical_guesses_stand_and_others_do_not() -> None:
    p = [{1: 0.95, 2: 0.05}, EVEN, {5: 1.0}]
    assert Typical().accept(Told([1, 3], p, None, {})) == ([1, 3, 72], [0, 1])
    assert Typical().accept(Told([2, 3], p, None, {})) == ([70], [])
    assert Typical(epsilon=0.04).accept(Told([2, 3], p, None, {})) == ([2, 3, 72], [0, 1])


def test_of_a_tree_the_longest_line_stands_and_then_the_likeliest() -> None:
    p = [{1: 0.4, 2: 0.6}, {3: 0.5, 4: 0.5}, {9: 1.0}, EVEN, EVEN, EVEN]
    longer = Told([1, 2, 3], p, None, {}, parents=[-1, -1, 0])
    assert Typical().accept(longer) == ([1, 3, 73], [0, 2])
    equal = Told([1, 2], p, None, {}, parents=[-1, -1])
    assert Typical().accept(equal) == ([2, 72], [1])
    part = Typical()
    part.accept(equal)
    part.accept(Told([7], p, None, {}))
    assert part.acts == {"accepted": 1, "rejected": 1}


def test_rollback_by_hand() -> None:
    """exp(-3) is .0498: a guess of .05 stands and one of .049 does not."""
    p = [{1: 0.05, 2: 0.95}, {3: 0.049, 4: 0.951}, {5: 1.0}]
    part = BigLittle()
    assert part.accept(Told([1, 3], p, None, {})) == ([1, 71], [0])
    assert part.acts == {"accepted": 1, "rolled_back": 1}
    assert BigLittle(rollback=4.0).accept(Told([1, 3], p, None, {})) == ([1, 3, 72], [0, 1])
    assert BigLittle(rollback=0.0).accept(Told([5], [{5: 1.0}, {1: 1.0}], None, {})) == ([5, 71], [0])
    assert BigLittle().accept(Told([7, 2, 3], p[:1] + p, None, {}, parents=[-1, -1, 1])) == ([2, 72], [1])


@pytest.mark.parametrize(
    "text", ["typical(epsilon=0)", "typical(epsilon=1.5)", "typical(delta=0)", "big_little(rollback=-1)"]
)
def test_wrong_arguments_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(f"accept={text}").build()


def test_what_is_given_up_by_hand() -> None:
    """p = (.5, .4, .1), q = (.2, .3, .5); 2 does not stand: (.2, .3, 0) + .5 p = (.45, .5, .05)."""
    p, q = np.array([0.5, 0.4, 0.1]), np.array([0.2, 0.3, 0.5])
    wanted = 0.5 * math.log(0.5 / 0.45) + 0.4 * math.log(0.4 / 0.5) + 0.1 * math.log(0.1 / 0.05)
    assert given_up(p, q, np.array([True, True, False])) == pytest.approx(wanted)
    assert given_up(p, q, np.array([False] * 3)) == pytest.approx(0.0)


@pytest.mark.parametrize("rule", ["accept=typical", "accept=big_little"])
def test_live_greedy_is_exact_and_sampled_takes_fewer_steps(rule: str) -> None:
    draft = "draft=big_little(guesses=5, fallback=0.1)"
    given = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "device": "cpu", "threads": 1}
    config = EngineConfig(model=resolve(None), techniques=(draft, rule), **given)  # type: ignore[arg-type]
    runtime: Runtime = build(prepare(config))
    ids = Tokenizer.load(resolve(None)).encode(STORY, add_special=False)
    greedy = [spec(i, ids[i : i + 30], max_tokens=20) for i in range(4)]
    assert Bench(runtime, techniques=[draft, rule]).run(greedy) == Bench(runtime).run(greedy)
    drawn = [spec(i, ids[i : i + 30], seed=i, temperature=1.0, max_tokens=32) for i in range(8)]
    free, race = Bench(runtime, techniques=[draft, rule]), Bench(runtime, techniques=[draft])
    free.run(drawn)
    race.run(drawn)
    stood, raced = (b.engine.stack["draft"].acts for b in (free, race))
    assert stood["accepted"] / stood["proposed"] > raced["accepted"] / raced["proposed"]
