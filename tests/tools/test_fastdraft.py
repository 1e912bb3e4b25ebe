"""FastDraft's recipe in small: what each phase reads and learns, runs that repeat and go on, bounds, what is never read."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tools.test_distil import SECRET, SHAPE, corpus
from tools.tiny import fastdraft
from tools.tiny.corpus import Corpus
from tools.tiny.fastdraft import (
    LONGEST_ANSWER,
    LONGEST_ASK,
    NOTHING,
    STEP,
    TEMPERATURES,
    Phase,
    Recipe,
    Run,
    answered,
    learn,
    packed,
    phases,
    requests,
)
from tools.tiny.mixture import Mixture

__all__ = ["corpus"]  # a fixture
SMALL = Recipe(text=2 * STEP, domain=STEP, answers=2 * STEP, asked=8, seed=3, minutes=10)


@pytest.fixture(scope="module")
def mixture(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Mixture:
    return Mixture(corpus, tokenizer)


def test_rates_by_hand() -> None:
    """100 steps, high for 40 of them, then half way down after 30 more."""
    phase = Phase("text", 100 * STEP, 1.0, 0.5)
    assert phase.learning(0) == pytest.approx(1 / 20)
    assert phase.learning(40) == 1.0
    assert phase.learning(70) == pytest.approx(0.75)
    assert phase.learning(99) == pytest.approx(0.5 + 0.5 * 0.01 / 0.6)
    assert [p.name for p in phases(SMALL, control=True)] == ["text", "domain", "control"]
    assert {p.positions for p in phases(SMALL, control=True)[2:]} == {
        p.positions for p in phases(SMALL, control=False)[2:]
    }


def test_answers_alone_are_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastdraft, "TOKENS", 4)
    monkeypatch.setattr(fastdraft, "WINDOWS", 2)
    monkeypatch.setattr(fastdraft, "STEP", 8)
    answers = [{"ask": [1, 2, 3], "answer": [4, 5]}, {"ask": [6], "answer": [7, 8]}]
    steps = list(islice(packed(answers, 0), 4))
    ids = [int(t) for tokens, _ in steps for t in tokens.flatten()]
    learnt = [int(t) for _, wanted in steps for t in wanted.flatten()]
    assert all(tokens.shape == (2, 4) for tokens, _ in steps)
    pieces = {5: [1, 2, 3, 4, 5], 3: [6, 7, 8]}
    at, seen = 0, []
    while at + 5 <= len(ids):
        size = 5 if ids[at] == 1 else 3
        assert ids[at : at + size] == pieces[size]
        assert learnt[at : at + size] == ([NOTHING] * 3 + [4, 5] if size == 5 else [NOTHING, 7, 8])
        seen.append(size)
        at += size
    assert all(sorted(seen[i : i + 2]) == [3, 5] for i in range(0, len(seen) - 1, 2)), (
        "each once before any comes again"
    )


def test_the_loss_is_that_of_transformers(bundled: Path) -> None:
    draft = LlamaForCausalLM.from_pretrained(bundled.parent / "draft", dtype=torch.float32)
    tokens = torch.randint(10, 4096, (2, 24), generator=torch.Generator().manual_seed(1))
    wanted = tokens.clone()
    wanted[:, :15] = NOTHING
    told = draft(tokens, labels=wanted).loss.item()
    assert learn(draft, [], (tokens, wanted)) == pytest.approx(told, rel=1e-5)


def test_requests_are_short_of_every_kind_and_never_of_what_is_held_out(mixture: Mixture) -> None:
    asks = requests(mixture, 80, 5)
    assert asks == requests(mixture, 80, 5) != requests(mixture, 80, 6)
    texts = [mixture.tokenizer.decode(ask) for ask in asks]
    assert all(0 < len(ask) <= LONGEST_ASK for ask in asks)
    for i, text in enumerate(texts):
        assert SECRET not in text
        assert text.endswith("<|end|><|assistant|>") == (i % 4 != 3)
    assert "What is 2 and 3?" in texts[0]
    assert "Write a story that begins: Once upon a time" in texts[1]
    for draw in (fastdraft.prose, fastdraft.chat):
        mixture.reseed(2)
        read = "".join(mixture.tokenizer.decode(draw(mixture)) for _ in range(100))
        assert SECRET not in read
        assert ("<|user|>" in read) == (draw is fastdraft.chat)


def test_answers_are_the_models_own(bundled: Path, mixture: Mixture) -> None:
    """Greedy ones are what `generate` gives, the end included; all are the same again under the same seed."""
    asks = requests(mixture, 16, 5)
    found = answered(bundled, asks, SMALL, lambda text: None)
    assert [f["temperature"] for f in found] == [TEMPERATURES[i // 4] for i in range(16)]
    assert found == answered(bundled, asks, SMALL, lambda text: None)
    model = LlamaForCausalLM.from_pretrained(bundled, dtype=torch.float32).eval()
    ended = 0
    for one in found[:4]:
        text = model.generate(torch.tensor([one["ask"]]), do_sample=False, max_new_tokens=LONGEST_ANSWER)[0].tolist()
        assert text == [*one["ask"], *one["answer"]]
        ended += one["answer"][-1] in (0, 4)
    assert ended


def run_of(corpus: Corpus, out: Path, bundled: Path, recipe: Recipe, said: list[str]) -> Run:
    out.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    return Run(corpus, out, bundled, SHAPE, recipe, said.append)


def test_a_run_repeats_shares_its_first_phases_and_is_a_draft(
    corpus: Corpus, bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastdraft, "JUDGED", 2)
    said: list[str] = []
    told = run_of(corpus, tmp_path / "a", bundled, SMALL, said).make()
    assert [(p["phase"], p["positions"], p["whole"]) for p in told["phases"]] == [
        ("text", 2 * STEP, True),
        ("domain", STEP, True),
        ("answers", 2 * STEP, True),
    ]
    assert 0 < told["phases"][2]["learnt"] < 2 * STEP
    assert json.loads((tmp_path / "a" / "recipe.json").read_text()) == told
    again = run_of(corpus, tmp_path / "b", bundled, SMALL, said)
    again.make()
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    said.clear()
    control = run_of(corpus, tmp_path / "a", bundled, SMALL, said).make(control=True)
    assert [line for line in said if "already" in line] == ["text is there already", "domain is there already"]
    assert control["phases"][:2] == told["phases"][:2]
    assert control["phases"][2]["learnt"] > told["phases"][2]["learnt"]
    other = load_file(tmp_path / "a" / "control" / "model.safetensors")
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    draft = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    assert draft.config.vocab_size == AutoTokenizer.from_pretrained(bundled).vocab_size


def test_what_time_does_not_allow_is_left_out_and_said(
    corpus: Corpus, bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastdraft, "JUDGED", 2)
    run = run_of(corpus, tmp_path, bundled, SMALL, [])
    run.until = 0.0
    told = run.make()
    assert [(p["positions"], p["whole"], p["loss"]) for p in told["phases"]] == [(0, False, [None, None])] * 3
    assert not (tmp_path / "1-text").exists(), "a phase that was cut short is not gone on from"


@pytest.mark.long
def test_the_answers_bring_a_draft_nearer_to_what_the_model_says(
    corpus: Corpus, bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of answers to other requests, the loss after the last phase beside the loss after as much of text."""
    monkeypatch.setattr(fastdraft, "JUDGED", 2)
    monkeypatch.setattr(fastdraft, "WARM_UP_STEPS", 2)
    recipe = Recipe(text=STEP, domain=STEP, answers=30 * STEP, asked=60, seed=1, minutes=10)
    for control in (False, True):
        run_of(corpus, tmp_path, bundled, recipe, []).make(control=control)
    run = run_of(corpus, tmp_path, bundled, recipe, [])
    others = answered(bundled, requests(run.mixture, 24, 77), recipe, lambda text: None)
    window = next(packed(others, 0))
    losses = [
        learn(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), [], window)
        for folder in (tmp_path, tmp_path / "control")
    ]
    assert losses[0] < losses[1] - 0.03
