"""Prompt lookup: the rule by hand, and live: the same tokens in fewer steps."""

from __future__ import annotations

import numpy as np
import pytest

from tests.exec.conftest import STORY, Bench, spec
from weft.draft.ngram import NGram
from weft.errors import ConfigError
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.thread import step
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.models import load_config
from weft.registry import parse
from weft.slots import Ask
from weft.types import RequestSpec, SamplingSpec, TokenItem


def say(part: NGram, context: np.ndarray, most: int = 16) -> list[int]:
    (guesses,) = part.propose([Ask(context, len(context), 0, most, SamplingSpec(), 1)], None)
    return list(guesses.tokens)


@pytest.mark.parametrize(
    ("context", "guesses"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1, 2, 3]),  # the last three stood before
        ([9, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1, 2, 3]),  # only the last two did
        ([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], [8, 1, 2, 3]),  # the most recent occurrence wins
        ([2, 3, 7, 1, 2, 3, 8, 4, 2, 3], [8, 4, 2, 3]),
        ([1, 2, 3, 4], []),
        ([5, 5, 5, 5], [5]),  # an occurrence may overlap the newest tokens
        ([1, 2, -1, 3, 1, 2], []),  # what followed has no id
        ([4], []),
        ([], []),
    ],
)
def test_the_rule_by_hand(context: list[int], guesses: list[int]) -> None:
    assert say(NGram(), np.array(context, np.int64)) == guesses
    assert say(NGram(), np.array(context, np.int64), most=2) == guesses[:2]


def test_equal_to_a_search_without_arrays() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        context = rng.integers(0, 4, rng.integers(1, 30))
        part = NGram(longest=4, shortest=1, guesses=3)
        wanted: list[int] = []
        for n in range(min(4, len(context) - 1), 0, -1):
            starts = [i for i in range(len(context) - n) if list(context[i : i + n]) == list(context[-n:])]
            if starts:
                wanted = list(context[starts[-1] + n :][:3])
                break
        assert say(part, context) == wanted, context


def test_wrong_arguments_are_refused() -> None:
    for text in ("draft=ngram(longest=1,shortest=2)", "draft=ngram(guesses=0)", "draft=ngram(size=3)"):
        with pytest.raises(ConfigError):
            parse(text).build()


@pytest.mark.parametrize("law", [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.95}])
def test_live_it_gives_the_same_tokens_in_fewer_steps(runtime: Runtime, law: dict[str, float]) -> None:
    ids = Tokenizer.load(resolve(None)).encode(STORY, add_special=False)
    specs = [spec(i, (ids[:90] + ids[40 : 60 + i]) * 2, seed=i, max_tokens=48, **law) for i in range(12)]
    plain = Bench(runtime)
    wanted = plain.run(specs)
    for limits in ({}, {"max_rows": 20, "max_samples": 14}):
        guessing = Bench(runtime, techniques=["draft=ngram(shortest=1)"], **limits)
        assert guessing.run(specs) == wanted
        acts = guessing.engine.stack["draft"].acts
        assert acts["proposed"] > acts["accepted"] > 20
        if not limits:
            assert guessing.steps < plain.steps


@pytest.mark.parametrize("technique", ["draft=ngram(guesses=3)", "draft=none"])
def test_a_full_batch_has_room_for_everybodys_guesses(technique: str) -> None:
    """A hundred sequences run, as many as may, and each has its guesses verified in the same step."""
    config = EngineConfig(
        model=resolve(None), device="cpu", threads=1, max_model_len=64, max_num_seqs=100, techniques=(technique,),
        draft_control="off",
    )  # fmt: skip
    setup = prepare(config)
    assert setup.limits.max_samples == (400 if technique == "draft=ngram(guesses=3)" else 100)
    runtime = build(setup)
    law = SamplingSpec(temperature=0.0, max_tokens=6)
    for i in range(100):
        runtime.engine.add(
            RequestSpec(id=i, items=(TokenItem((7, 8, 9, 10, 11, 7, 8)),), sampling=law, forced=(9,), seed=i), 0.0
        )
    while runtime.engine.has_work:
        step(runtime.engine, runtime.executor)
    proposed = runtime.engine.stats.acts.get("draft=ngram.proposed", 0)
    assert (proposed >= 300) is (technique != "draft=none")


def test_room_for_guesses_is_bounded_where_the_vocabulary_is_large() -> None:
    config = EngineConfig(
        model=load_config("bench/shapes/qwen2.5-0.5b.json"), load="random", device="cpu", threads=1, max_model_len=64,
        max_num_seqs=100,
        techniques=("draft=ngram(guesses=5)",),
    )  # fmt: skip
    assert prepare(config).limits.max_samples == 100 + (128 << 20) // (4 * 151936)
