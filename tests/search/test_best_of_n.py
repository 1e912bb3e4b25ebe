"""Best of n live: candidate i is what sequence i of an ordinary request draws, and the likeliest comes back."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from tests.exec.conftest import STORY, Bench, spec
from weft.core.noise import child_seed
from weft.errors import ConfigError, EngineError
from weft.exec.build import Runtime
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.registry import parse
from weft.slots import SearchView
from weft.types import Finished, Rejected, SamplingSpec, Stop, Tell, TokenLogprob, Tokens


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


def choose(bench: Bench, id: int, by: str) -> list[list[int]]:
    """The definition, from n ordinary sequences and their log-probabilities."""
    drawn: dict[int, list[TokenLogprob]] = {}
    for e in bench.events:
        if isinstance(e, Tokens) and e.id == id:
            drawn.setdefault(e.index, []).extend(e.logprobs)

    def score(x: list[TokenLogprob]) -> float:
        return sum(e.logprob for e in x) / (len(x) if by == "mean" else 1)

    return [[e.token for e in drawn[i]] for i in sorted(drawn, key=lambda i: -score(drawn[i]))]


@pytest.mark.parametrize("by", ["mean", "sum"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"max_rows": 9, "max_samples": 4}, {"blocks": 20}, {"techniques": ["draft=ngram(shortest=1)"]}],
    ids=["roomy", "small steps", "tight", "guesses"],
)
def test_drawing_n_and_choosing(runtime: Runtime, ids: list[int], by: str, changes: dict[str, Any]) -> None:
    end = Tokenizer.load(resolve(None)).encode(".", add_special=False)[0]
    law = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 20, "stop_ids": (4, end)}
    prompts = [ids[:40], ids[10:90], (ids[:50] * 2)[:80]]
    plain = Bench(runtime)
    plain.run([spec(i, p, seed=i, n=6, logprobs=0, **law) for i, p in enumerate(prompts)])
    parts = [f"search=best_of_n(n=6, by='{by}')", *changes.get("techniques", [])]
    bench = Bench(runtime, **{**changes, "techniques": parts})
    out = bench.run([spec(i, p, seed=i, n=2, **law) for i, p in enumerate(prompts)])
    for i in range(3):
        assert [out[i, 0], out[i, 1]] == choose(plain, i, by)[:2]
    ends = [e for e in bench.events if isinstance(e, Finished)]
    told = sum(map(len, out.values()))
    assert told + sum(e.discarded for e in ends) == bench.engine.stats.generation_tokens
    if "blocks" in changes:
        assert bench.engine.stats.preemptions > 0
    if "techniques" in changes:
        assert bench.engine.stats.acts["draft=ngram.accepted"] > 0


def test_candidates_share_the_prompt(runtime: Runtime, ids: list[int]) -> None:
    bench, size = Bench(runtime, techniques=["search=best_of_n(n=8)"]), runtime.setup.plan.block_tokens
    peak = 0

    def look(b: Bench) -> None:
        nonlocal peak
        peak = max(peak, b.engine.pool.referenced)

    bench.run([spec(1, (ids * 2)[: 8 * size], seed=1, max_tokens=size)], each=look)
    assert bench.engine.stats.prompt_tokens == 8 * size + 7, "a fork computes the last row anew"
    assert peak <= len(runtime.setup.groups) * (7 + 8 * 2), "seven blocks of the prompt are held once, not eight times"


def test_the_rule_by_hand() -> None:
    """Scores, equal ones by index, and a candidate that is stopped as soon as it cannot win."""

    def tokens(index: int, *logprobs: float) -> Tokens:
        return Tokens(
            1, index, tuple(range(len(logprobs))), tuple(TokenLogprob(t, p, 1) for t, p in enumerate(logprobs))
        )

    def end(index: int) -> Finished:
        return Finished(1, index, "length")

    view = SearchView(n=2, prompt=5, room=10, sampling=SamplingSpec(logprobs=-1))
    program = parse("search=best_of_n(n=4)").build().begin(view)
    assert program.sequences == 4
    assert program.sampling.logprobs == 0
    assert program.step([tokens(0, -1.0, -3.0), end(0), tokens(1, -9.0), tokens(2, -1.0), tokens(3, -0.5)]) == []
    # Means: 0 has -2, 2 has -2 with fewer tokens.  Candidate 1 has -9 so far, at best -9/10 as a mean: it may still win.
    assert program.step([tokens(2, -3.0), end(2)]) == []
    # Once 3 ends at -0.5, the second place is -2, which is not beyond the reach of -9/10 ...
    assert program.step([end(3)]) == []
    # ... but is beyond that of -21/10: 1 is stopped, and the answer is there.  Equal scores go by index: 0 before 2.
    stop, first, second = program.step([tokens(1, -12.0)])
    assert stop == Stop(1)
    assert (first, second) == (Tell(0, (0,), (), "length"), Tell(1, (0, 1), (), "length"))
    by_sum = parse("search=best_of_n(n=2, by='sum')").build().begin(SearchView(1, 5, 10, SamplingSpec()))
    assert by_sum.step([tokens(0, -1.0, -3.0), tokens(1, -3.0, -0.5, -0.6)]) == []
    stop, told = by_sum.step([end(0)])
    assert stop == Stop(1), "a sum below the best can only fall"
    assert told.tokens == (0, 1)


def test_a_seed_is_a_candidates_own(runtime: Runtime, ids: list[int]) -> None:
    """The winner is what a request under its child seed draws alone."""
    law: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12}
    won = Bench(runtime, techniques=["search=best_of_n(n=5)"]).run([spec(1, ids[:30], seed=77, **law)])[1, 0]
    alone = [Bench(runtime).run([spec(1, ids[:30], seed=child_seed(77, i), **law)])[1, 0] for i in range(5)]
    assert won in alone


def test_an_executor_without_log_probabilities_is_named(runtime: Runtime, ids: list[int]) -> None:
    program = parse("search=best_of_n(n=2)").build().begin(SearchView(1, 5, 10, SamplingSpec()))
    with pytest.raises(EngineError, match="no log-probabilities"):
        program.step([Tokens(1, 0, (5,))])
    bench = Bench(runtime, techniques=["search=best_of_n(n=2)"])
    events = list(bench.engine.add(spec(1, ids[:3]), 0.0))
    while bench.engine.has_work:
        plan, _ = bench.engine.schedule(0.0)
        result = bench.executor.execute(plan)
        mute = replace(result, works=tuple(replace(work, logprobs=()) for work in result.works))
        events += bench.engine.commit(0.0, plan, mute)
    (end,) = events
    assert isinstance(end, Finished)
    assert end.reason == "error"
    assert "no log-probabilities" in str(end.error)


def test_candidates_are_counted_once_they_draw(runtime: Runtime, ids: list[int]) -> None:
    """Not for a request that is rejected, and once for one that takes many steps."""
    bench = Bench(runtime, techniques=["search=best_of_n(n=3)"], blocks=8)
    (no,) = bench.engine.add(spec(1, ids[:50], max_tokens=400), 0.0)
    assert isinstance(no, Rejected)
    assert no.code == "never_fits", "a request that is rejected before its search begins"

    def acts() -> dict[str, int]:
        return {name: bench.engine.stats.acts[f"search=best_of_n.{name}"] for name in ("candidates", "forks")}

    assert acts() == {"candidates": 0, "forks": 0}
    bench.run([spec(2, ids[:20], max_tokens=9)])
    assert acts() == {"candidates": 3, "forks": 2}


def test_wrong_arguments_are_refused() -> None:
    for text in ("n=0", "n=2, keep=3", "n=200", "by='median'", "keep=-1", "width=3"):
        with pytest.raises(ConfigError):
            parse(f"search=best_of_n({text})").build()
