"""Acceptance as the law says it: the coupling by simulation, and the bundled pair within 2 % of what its laws predict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.draft import table
from bench.draft.law import Trials, laws, overlap, predicted, race, reader, repeated
from weft.exec.build import EngineConfig, build, prepare
from weft.exec.sampler import gumbel
from weft.exec.thread import step
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve, resolve_draft
from weft.types import Plan, RequestSpec, SamplingSpec, StepResult, TokenItem, Tokens

OPENINGS = (
    "It had rained for three days when the stranger came down the road from the hills, and",
    "The captain put the letter into his pocket without a word. Then he looked at the sea and",
    "When I was a child we lived in a house with a green door, near the market, where my father",
    "Once upon a time there was a small dog who wanted to see the world. One morning he",
)


def test_the_chance_of_a_tie_of_two_races_by_hand_and_by_the_engines_own_noise() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): x = 0: 1 / max(1, 1) + max(1, 3) = 1/4; x = 1: 1 / (max(1, 1/3) + 1) = 1/2."""
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    assert race(p, q).item() == pytest.approx(0.75)
    assert overlap(p, q).item() == pytest.approx(0.75)
    rnd = np.random.default_rng(3)
    p3, q3 = (torch.tensor(rnd.dirichlet(np.ones(6), 1)) for _ in range(2))
    ids = np.arange(6)
    noise = np.stack([gumbel(7, i, ids) for i in range(40_000)])
    equal = ((p3.log().numpy() + noise).argmax(1) == (q3.log().numpy() + noise).argmax(1)).mean()
    assert race(p3, q3).item() == pytest.approx(equal, abs=0.01)
    assert race(p3, p3).item() == pytest.approx(1.0)
    assert race(p3, q3).item() <= overlap(p3, q3).item()


def test_tokens_that_one_law_excludes_never_stand() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.0, 0.5, 0.5]])
    assert race(p, q).item() == pytest.approx(1 / 3)  # x = 1: y = 0 counts 1, y = 1 counts 1, y = 2 counts 1
    assert overlap(p, q).item() == pytest.approx(0.5)


def test_eight_grams_that_come_again() -> None:
    assert repeated(list(range(20))) == 0
    assert repeated([1] * 17) == pytest.approx(0.9)
    assert repeated([1, 2]) == 0


@pytest.mark.parametrize(
    ("accept", "temperature"), [("race", 0.8), ("rejection", 1.0), ("race", 0.0)], ids=["race", "rejection", "greedy"]
)
def test_guesses_stand_as_often_as_the_laws_predict(accept: str, temperature: float) -> None:
    """Some 4,000 trials, of which chance alone moves the rate by 0.007; `transformers` reads the same texts."""
    model = resolve(None)
    tokenizer = Tokenizer.load(model)
    prompts = [tokenizer.encode(text, add_special=False) for text in OPENINGS]
    parts = ["draft=speculative_sampling(guesses=3)", f"accept={accept}"]
    config = EngineConfig(
        model=model,
        dtype="float32",
        threads=1,
        max_model_len=512,
        max_num_seqs=16,
        techniques=parts,
        draft_control="off",
    )
    runtime = build(prepare(config))
    trials, owners, outputs = Trials(), dict[int, int](), dict[int, list[int]]()
    inner = runtime.executor.execute

    def execute(plan: Plan) -> StepResult:
        owners.update((r.rid, r.id) for r in runtime.engine.requests())
        trials.take(plan, found := inner(plan))
        return found

    runtime.executor.execute = execute  # type: ignore[method-assign]
    count = 16 if temperature else 4
    for id in range(count):
        sampling = SamplingSpec(max_tokens=400 if temperature else 150, temperature=temperature)
        items = (TokenItem(tuple(prompts[id % 4])),)
        assert runtime.engine.add(RequestSpec(id=id, items=items, sampling=sampling, seed=id), 0.0) == []
    while runtime.engine.has_work:
        for event in step(runtime.engine, runtime.executor)[0]:
            if isinstance(event, Tokens):
                outputs.setdefault(event.id, []).extend(event.tokens)
    texts = [(prompts[owners[rid] % 4], outputs[owners[rid]], mine) for rid, mine in trials.by_sequence.items()]
    told = predicted(reader(model), reader(resolve_draft("bundled")), texts, temperature, weighs=accept == "rejection")
    assert trials.tried > (3000 if temperature else 300)
    assert trials.stood / trials.tried == pytest.approx(told, abs=0.02 if temperature else 0.01)


def test_the_table_runs_quickly_and_tells_each_row(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ["--quick", "--drafts", "ngram", "--texts", "random", "--temperatures", "0.8", "--threads", "1"]
    assert table.main([str(tmp_path), *asked, "--out", str(tmp_path / "draft.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[3] for line in lines[2:]] == ["none", "perfect", "ngram", "ngram"]
    assert not list(tmp_path.iterdir()), "a quick look writes nothing"


def test_a_law_at_temperature_zero_is_certain() -> None:
    found = laws(reader(resolve_draft("bundled")), [5, 6, 7], 0.0, torch.tensor([0, 2]))
    assert found.sum(-1).tolist() == [1.0, 1.0]
    assert found.max(-1).values.tolist() == [1.0, 1.0]
