"""BiLD's fallback: by hand, and live against what transformers says of the draft model's confidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bench.draft.law import reader
from tests.exec.conftest import STORY, Bench, spec
from weft.draft.bild import BiLD
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve, resolve_draft
from weft.slots import Ask
from weft.types import Plan, SamplingSpec, StepResult

FALLBACK = 0.25
PART = f"draft=bild(fallback={FALLBACK},guesses=5)"


class Script:
    """A second model whose logits are told, row by row and pass by pass; each row's likeliest token is drawn."""

    def __init__(self, *passes: Sequence[Sequence[float]]) -> None:
        self._passes = [torch.tensor(one).log() for one in passes]
        self.asked: list[list[tuple[int, list[int]]]] = []

    def __call__(self, rows: Sequence[tuple[int, Sequence[int]]]) -> Any:
        self.asked.append([(i, list(ids)) for i, ids in rows])
        return self._passes[len(self.asked) - 1]

    def draw(self, rows: Sequence[tuple[int, Sequence[int]]], logits: Any) -> list[tuple[int, Any]]:
        assert len(rows) == len(logits)
        return [(int(x.argmax()), None) for x in logits]


def ask(most: int = 8) -> Ask:
    return Ask([9], 1, 0, most, SamplingSpec(temperature=0.0), 0)


def test_a_row_that_is_not_sure_hands_over_and_the_others_go_on() -> None:
    run = Script(
        [[0.6, 0.3, 0.1], [0.3, 0.4, 0.3], [0.1, 0.1, 0.8]], [[0.2, 0.5, 0.3], [0.2, 0.35, 0.45]], [[0.34, 0.33, 0.33]]
    )
    part = BiLD(fallback=0.5)
    found = part.propose([ask(), ask(), ask()], run)  # type: ignore[arg-type]
    assert [list(one.tokens) for one in found] == [[0, 1], [], [2]]
    assert run.asked == [[(0, [9]), (1, [9]), (2, [9])], [(0, [0]), (2, [2])], [(0, [1])]]
    assert part.acts == {"proposed": 0, "accepted": 0, "draft_rows": 6, "handed_over": 3}


def test_the_threshold_itself_is_sure_enough_and_most_ends_it() -> None:
    run = Script([[0.5, 0.25, 0.25]], [[0.5, 0.25, 0.25]])
    assert list(BiLD(fallback=0.5, guesses=2).propose([ask()], run)[0].tokens) == [0, 0]  # type: ignore[arg-type]
    assert list(BiLD(fallback=0.5).propose([ask(0)], Script())[0].tokens) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{"guesses": 0}, {"guesses": 33}, {"fallback": 1.1}, {"fallback": -0.1}, {"model": ""}]
)
def test_arguments_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|probability|empty"):
        BiLD(**wrong)


@pytest.fixture(scope="module")
def own() -> Runtime:
    given = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "device": "cpu", "threads": 1}
    return build(prepare(EngineConfig(model=resolve(None), techniques=[PART], draft_control="off", **given)))


@torch.no_grad()
def test_live_a_guess_is_made_exactly_where_the_draft_is_sure(own: Runtime) -> None:
    """Of every chain: at each guess the draft's likeliest token has the threshold, and where the chain ended early it had not."""
    ids = Tokenizer.load(resolve(None)).encode(STORY, add_special=False)
    specs = [spec(i, ids[5 * i : 5 * i + 16], seed=i, max_tokens=24, temperature=0.8) for i in range(6)]
    bench = Bench(own, techniques=[PART])
    chains: list[tuple[int, int, list[int]]] = []
    owners: dict[int, int] = {}
    inner = bench.executor.execute

    def execute(plan: Plan) -> StepResult:
        owners.update((r.rid, r.id) for r in bench.engine.requests())
        for work in plan.works:
            if work.model == "target" and work.output > 0:
                chains.append((owners[work.request], work.output, list(work.tokens[len(work.tokens) - work.guesses :])))
        return inner(plan)

    bench.executor.execute = execute  # type: ignore[method-assign]
    found = bench.run(specs)
    draft = reader(resolve_draft("bundled"))
    made = ended = 0
    for id, output, guesses in chains:
        text = [*ids[5 * id : 5 * id + 16], *found[id, 0][:output], *guesses]
        best = draft(torch.tensor([text])).logits[0, len(text) - len(guesses) - 1 :].softmax(-1).amax(-1)
        near = (best - FALLBACK).abs() < 1e-4
        assert bool(((best[:-1] >= FALLBACK) | near[:-1]).all()), "a guess where the draft was not sure"
        made += len(guesses)
        if len(guesses) < min(5, 24 - output - 1):
            assert best[-1] < FALLBACK or near[-1], "no guess where the draft was sure"
            ended += 1
    assert made > 50
    assert ended > 20
    assert found == Bench(own).run(specs), "whatever was guessed, tokens are those of the race"
