"""The controller on a live engine: equal tokens whatever it chooses, and silence where prompts are words by lot."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from tests.exec.drafts import stranger
from weft.cli.app import app
from weft.errors import ConfigError
from weft.exec.build import EngineConfig, build, prepare
from weft.exec.thread import step
from weft.hub import resolve
from weft.types import Plan, RequestSpec, SamplingSpec, StepResult, TokenItem, Tokens

MS = 1e-3


def at_known_prices(plan: Plan, found: StepResult) -> StepResult:
    """As if a step took 10 ms, each of its rows 1 ms and each guess 1 ms."""
    rows = sum(len(w.tokens) for w in plan.works if w.model == "target")
    draft_s = MS * max((len(f.draft) for f in found.works), default=0)
    return msgspec.structs.replace(found, forward_s=(10 + rows) * MS + draft_s, sample_s=0.0, draft_s=draft_s)


def answers(
    part: str, control: str, laws: list[dict[str, Any]], words: range, tokens: int = 80, *, priced: bool = True
) -> tuple[dict[int, list[int]], int, list[int]]:
    """(outputs, guesses that were verified, what was wanted step by step) of a live engine.

    priced: its times are replaced by known ones, so that no machine is too fast.
    """
    rnd = random.Random(2)
    config = EngineConfig(
        model=resolve(None), dtype="float32", threads=1, max_model_len=192, techniques=[part], draft_control=control
    )
    runtime = build(prepare(config))
    verified, wants, out = 0, list[int](), dict[int, list[int]]()
    inner = runtime.executor.execute

    def execute(plan: Plan) -> StepResult:
        nonlocal verified
        found = inner(plan)
        assert 0 <= found.draft_s <= found.forward_s + found.sample_s
        verified += sum(w.guesses for w in plan.works)
        wants.extend(w.want for w in plan.works if w.samples)
        return at_known_prices(plan, found) if priced else found

    runtime.executor.execute = execute  # type: ignore[method-assign]
    for id, law in enumerate(laws):
        items = (TokenItem(tuple(rnd.choice(words) for _ in range(40))),)
        spec = RequestSpec(id=id, items=items, sampling=SamplingSpec(max_tokens=tokens, **law), seed=id)
        assert runtime.engine.add(spec, 0.0) == []
    while runtime.engine.has_work:
        for event in step(runtime.engine, runtime.executor)[0]:
            if isinstance(event, Tokens):
                out.setdefault(event.id, []).extend(event.tokens)
    runtime.engine.check()
    return out, verified, wants


HOT: list[dict[str, Any]] = [{"temperature": 1.5}] * 3
"""So hot that answers are words by lot, too."""


def test_a_draft_that_is_never_right_ends_off_and_the_tokens_are_those_of_plain_decoding(tmp_path: Path) -> None:
    part = f"draft=speculative_sampling(guesses=4, model='{stranger(tmp_path)}')"
    words = range(10, 4096)
    plain, _, _ = answers("draft=none", "on", HOT, words)
    free, all_of_them, _ = answers(part, "off", HOT, words)
    found, few, wants = answers(part, "on", HOT, words)
    assert plain == free == found
    assert few < all_of_them / 5
    assert sum(w > 0 for w in wants[-60:]) <= 4  # probes


def test_lookups_in_words_by_lot_end_off_too() -> None:
    """Three words by lot: the last two stood before, always, and what followed them says nothing."""
    words = range(300, 303)
    only = [{"temperature": 2.0, "logit_bias": dict.fromkeys(words, 100.0)}] * 2
    plain, _, _ = answers("draft=none", "on", only, words, 120)
    free, all_of_them, _ = answers("draft=ngram(guesses=8)", "off", only, words, 120)
    found, few, _ = answers("draft=ngram(guesses=8)", "on", only, words, 120)
    assert plain == free == found
    assert few < all_of_them / 2


OWN = ("ngram", "trie", "hierarchy", "jacobi")


@pytest.mark.parametrize("part", [*(f"draft={name}" for name in OWN), "draft=speculative_sampling(guesses=8)"])
def test_with_the_machines_own_times_tokens_are_equal(part: str) -> None:
    laws: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 0.7, "top_p": 0.9}]
    words = range(300, 340)
    plain, _, _ = answers("draft=none", "on", laws, words, 40, priced=False)
    found, _, _ = answers(part, "on", laws, words, 40, priced=False)
    assert plain == found


def test_the_flag_is_on_or_off() -> None:
    with pytest.raises(ConfigError, match="--draft-control is on or off, got 'maybe'"):
        prepare(EngineConfig(model=resolve(None), draft_control="maybe"))
    told = CliRunner().invoke(app, ["generate", "--draft-control", "maybe", "Hello"])
    assert told.exit_code == 2
    assert "--draft-control is on or off" in told.stderr
