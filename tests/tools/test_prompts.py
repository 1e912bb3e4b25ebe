"""What teaches prompt tokens: a mask by hand, beside texts read one by one; a loss that falls, the same each time; a command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tools.test_distil import SECRET, corpus
from tools.tiny import prompts
from tools.tiny.corpus import Corpus
from tools.tiny.prompts import Course, fresh, judge, outputs, train
from tools.tiny.sampled import Sampled, write
from weft.draft.prompt_tokens import PromptTokens
from weft.exec.build import EngineConfig, build, prepare

__all__ = ["corpus"]  # a fixture
COURSE = Course(tokens=2, steps=24, texts=2, places=12, variation=0.5)


@pytest.fixture(scope="module")
def texts(teacher: LlamaForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    begin = torch.arange(300, 348).view(8, 6)
    tokens, hidden = write(teacher, begin, 64, torch.ones(8), torch.Generator().manual_seed(1))
    return tokens.int(), hidden.bfloat16()


def test_tokens_behind_many_places_are_as_behind_each_alone(
    teacher: LlamaForCausalLM, texts: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Beside the model's ordinary pass over a text that ends at the place, and the tokens behind it."""
    soft, rows = fresh(teacher.model.embed_tokens.weight, 3), texts[0][:2].long()
    at = torch.tensor([[0, 17, 40], [5, 5, 60]])
    found = outputs(soft, teacher, rows, at)
    for row in range(2):
        for place in range(3):
            text = teacher.model.embed_tokens(rows[row, : at[row, place] + 1])
            wanted = teacher.model(inputs_embeds=torch.cat([text, soft])[None]).last_hidden_state[0, -3:]
            assert torch.allclose(found[row, place], wanted, atol=2e-4)


def test_a_few_steps_bring_them_nearer_the_same_way_each_time(
    teacher: LlamaForCausalLM, texts: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "LOG_STEPS", 6)
    soft, said = fresh(teacher.model.embed_tokens.weight, 2), list[str]()
    found = train(soft, teacher, texts, COURSE, said.append)
    overlap = [[float(x) for x in line.split("overlap ")[1].split()] for line in said]
    assert len(overlap) == 4
    assert sum(overlap[-1]) > 1.2 * sum(overlap[0])
    assert torch.equal(train(soft, teacher, texts, COURSE, said.append), found)
    assert not torch.equal(train(soft, teacher, texts, replace(COURSE, variation=0.0), said.append), found)


def test_what_is_judged_is_how_often_a_guess_stands(teacher: LlamaForCausalLM) -> None:
    """What stands at temperature 1 is the overlap of two laws, added up here text by text."""
    soft, begin = fresh(teacher.model.embed_tokens.weight, 2), torch.arange(300, 312).view(2, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "NEW_TOKENS", 8)
        found = judge(soft, teacher, begin)
        tokens, _ = prompts.write(teacher, begin, 14, torch.ones(2), torch.Generator().manual_seed(5))
    total = torch.zeros(2)
    with torch.no_grad():
        for row in range(2):
            p = teacher(tokens[row : row + 1]).logits[0].softmax(-1)
            for at in range(5, 12):
                text = torch.cat([teacher.model.embed_tokens(tokens[row, : at + 1]), soft])
                q = teacher(inputs_embeds=text[None]).logits[0, -2:].softmax(-1)
                total += torch.minimum(p[at + 1 : at + 3], q).sum(-1)
    assert found["sampled"] == pytest.approx((total / 14).tolist(), abs=1e-3)
    assert max(found["greedy"]) < 0.3


def test_the_command_writes_a_file_that_the_technique_takes(
    corpus: Corpus, bundled: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.tiny.sampled.ROWS", 4)
    monkeypatch.setattr("tools.tiny.sampled.TOKENS", 160)
    monkeypatch.setattr(prompts, "KINDS", ())
    out = tmp_path / "tokens.safetensors"
    flags = ["--steps", "2", "--tokens", "3", "--rounds", "2", "--texts", "1", "--places", "4"]
    assert prompts.main([str(corpus.data), str(out), "--teacher", str(bundled), *flags]) == 0
    tokens, _ = Sampled(tmp_path / "tokens.sampled").read(2)
    read = AutoTokenizer.from_pretrained(bundled)
    assert not any(SECRET in read.decode(row) for row in tokens.tolist()), "held-out novels are never read"
    part = f"draft=prompt_tokens(guesses=3, weights={str(out)!r})"
    config = EngineConfig(model=bundled, device="cpu", dtype="float32", techniques=[part])
    found: PromptTokens = build(prepare(config)).engine.stack["draft"]
    assert found._vectors.shape == (3, 256)
