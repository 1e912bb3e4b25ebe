"""Sequences that lose their blocks in the middle of guessing, step after step: drafts with a second model, chains and trees."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.draft import tree_law
from bench.draft.crossvocab import foreign
from bench.draft.law import Trials, reader
from bench.draft.law import slips as chain_slips
from bench.draft.stands import Guessing, made, written
from bench.draft.tree_law import Places
from tests.draft.test_speculative_sampling import LAWS
from tests.exec.conftest import STORY, Bench, spec
from weft.core.engine import Engine
from weft.exec.build import Runtime
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve, resolve_draft
from weft.types import Event, Plan, RequestSpec, SamplingSpec

DRAFTS = {
    "dyspec": "draft=dyspec(guesses=6, depth=3)",
    "paths": "draft=paths(paths=2, length=3)",
    "bild": "draft=bild(guesses=4, fallback=0.2)",
    "crossvocab": "draft=crossvocab(guesses=3, model={folder!r})",
    "vocabtrim": "draft=vocabtrim(guesses=3, keep=200, text={text!r})",
}


def guessing(draft: str, place: Path, accept: str = "race") -> Runtime:
    """The bundled model with a draft, what it reads written to `place`."""
    (place / "story.txt").write_text(STORY)
    if draft == "crossvocab":
        foreign(place, 1000)
    part = DRAFTS[draft].format(folder=str(place), text=str(place / "story.txt"))
    return made(Guessing("", part, lambda _: None, accept))


def disturbance(steps: int = 60) -> Callable[[Engine], None]:
    """Called between steps, it takes the blocks of two that are running; nobody's after so many steps, so that all end."""
    rng, left = random.Random(1), iter(range(steps))

    def disturb(engine: Engine) -> None:
        scheduler = engine.scheduler
        if next(left, None) is not None:
            for victim in rng.sample(list(scheduler.running.values()), min(2, len(scheduler.running))):
                scheduler.preempt(victim)
                scheduler.enqueue(victim, 0.0)

    return disturb


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


@pytest.fixture(scope="module")
def specs(ids: list[int]) -> list[RequestSpec]:
    """16 requests under every law, one in four of them of two sequences."""
    return [
        spec(i, ids[3 * i : 3 * i + 30], seed=i, n=1 + (i % 4 == 1), max_tokens=40, **LAWS[i % 8]) for i in range(16)
    ]


@pytest.fixture(scope="module")
def plain(specs: list[RequestSpec]) -> dict[tuple[int, int], list[int]]:
    return Bench(made(Guessing("", "draft=none", lambda _: None))).run(specs)


@pytest.mark.parametrize(
    ("draft", "accept"), [*((draft, "race") for draft in DRAFTS), ("paths", "rejection"), ("bild", "typical")]
)
def test_tokens_are_those_of_plain_decoding(
    specs: list[RequestSpec], plain: dict[tuple[int, int], list[int]], tmp_path: Path, draft: str, accept: str
) -> None:
    """Under a rule that is not exact a drawn token hangs on where guesses began, which preemption moves; greedy ones do not."""
    runtime, disturb = guessing(draft, tmp_path, accept), disturbance()
    bench = Bench(runtime, draft=runtime.engine.stack["draft"], techniques=[f"accept={accept}"])
    found = bench.run(specs, lambda bench: disturb(bench.engine))
    assert bench.engine.stats.preemptions > 30
    acts = bench.engine.stack["draft"].acts
    assert acts["proposed"] > acts["accepted"] > 40
    exact = {key for key in plain if accept == "race" or specs[key[0]].sampling.temperature == 0}
    assert {key: found[key] for key in exact} == {key: plain[key] for key in exact}


@pytest.mark.parametrize(
    ("part", "trees"), [("speculative_sampling(guesses=3)", False), ("paths(paths=2, length=3)", True)]
)
def test_rejection_weighs_by_the_laws_of_the_text(ids: list[int], part: str, trees: bool) -> None:
    """What was guessed and what stood is what the noise of its place makes of both laws, which `transformers` reads."""
    runtime, disturb = made(Guessing("", f"draft={part}", lambda _: None, "rejection")), disturbance()
    engine = runtime.engine
    schedule = engine.schedule

    def between(now: float) -> tuple[Plan, list[Event]]:
        disturb(engine)
        return schedule(now)

    engine.schedule = between  # type: ignore[method-assign]
    prompts, sampling = [ids[9 * i : 9 * i + 24] for i in range(8)], SamplingSpec(max_tokens=40, temperature=0.8)
    texts = written(runtime, prompts, range(8), sampling, Places() if trees else Trials())
    assert engine.stats.preemptions > 30
    assert sum(len(text[2]) for text, _ in texts) > 100
    slips = tree_law.slips if trees else chain_slips
    target, draft = reader(resolve(None)), reader(resolve_draft("bundled"))
    assert sum(slips(target, draft, text, seed, 0.8, weighs=True) for text, seed in texts) == 0
