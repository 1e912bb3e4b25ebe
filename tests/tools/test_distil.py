"""The parts that taught the bundled draft: the teacher's own texts, the losses, the figures of acceptance, what is never read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.tiny.accept import GUESSES, LENGTHS, Prompts, ends_of, greedy_step, in_a_row, mean, up_to_end
from tools.tiny.corpus import HELD_OUT, Corpus
from tools.tiny.distil import Course, Shape, build, distances, learn, measure, optimizers_of
from tools.tiny.mixture import Mixture
from tools.tiny.sampled import Sampled, write

SHAPE = Shape(layers=1, width=32, heads=2, kv_heads=1, head_dim=16, intermediate=48)
SECRET = "zyxomma"
"""A word that stands in the held-out novels of a made-up data folder, and nowhere else."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A data folder in small: every file of the real one, filled with sentences of our own."""
    data = tmp_path_factory.mktemp("data")

    def put(name: str, text: str) -> None:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(text, encoding="utf8")

    prose = "The ferry came late, and nobody stood on the quay but a boy with a lantern. "
    put("text/novels/Somebody_Island_1900.txt", prose * 60)
    for name in HELD_OUT:
        put(f"text/novels/{name}", f"{prose}{SECRET} went up the hill. " * 60)
    put("text/wikitext-2/valid.txt", "The harbour is a town of the north coast. " * 60)
    for name in ("tinystories_v1_train_head.txt", "tinystories_v2_gpt4_1727stories.txt"):
        put(f"text/tinystories/{name}", "Once upon a time there was a dog. It ran to the sea and back again. " * 8)
    put("eval/gsm8k/train.jsonl", json.dumps({"question": "What is 2 and 3?", "answer": "2+3=5 #### 5"}))
    return Corpus(data)


@pytest.fixture(scope="module")
def mixture(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Mixture:
    return Mixture(corpus, tokenizer)


# ---------------------------------------------------------------------------------------------- what is read


def test_held_out_novels_reach_prompts_and_nothing_else(corpus: Corpus, mixture: Mixture) -> None:
    mixture.reseed(3)
    drawn = "".join(mixture.tokenizer.decode(mixture.draw(256)) for _ in range(200))
    assert "ferry" in drawn
    assert "harbour" in drawn
    assert SECRET not in drawn
    prompts = Prompts(corpus, mixture.tokenizer)
    assert any(SECRET in mixture.tokenizer.decode(row) for row in prompts.rows("novels", 8).tolist())


def test_the_real_held_out_novels_are_not_among_those_taught(shared: Callable[[str], Path]) -> None:
    corpus = Corpus(shared("data"))
    taught = list(corpus.novels())
    assert len(taught) == 54
    for text in corpus.held_out():
        middle = len(text) // 2
        assert not [novel for novel in taught if text.replace("\r\n", "\n")[middle : middle + 200] in novel]


def test_prompts_are_of_one_length_and_the_same_each_time(corpus: Corpus, mixture: Mixture) -> None:
    first, second = Prompts(corpus, mixture.tokenizer), Prompts(corpus, mixture.tokenizer)
    second.rows("novels", 3)
    for kind, length in LENGTHS.items():
        rows = first.rows(kind, 5)
        assert rows.shape == (5, length)
        assert torch.equal(rows, second.rows(kind, 5))
    chat = mixture.tokenizer.decode(first.rows("chat", 1)[0])
    assert chat.startswith("<|user|>")
    assert chat.endswith("<|end|><|assistant|>")
    recall = mixture.tokenizer.decode(first.rows("recall", 1)[0])
    assert "The number of" in recall
    assert recall.endswith("?<|end|><|assistant|>")


# ---------------------------------------------------------------------------------------------- the teacher's own texts


def test_rows_at_temperature_zero_are_what_generate_gives(teacher: LlamaForCausalLM, mixture: Mixture) -> None:
    begin = torch.from_numpy(mixture.draw(16)).long()[None].repeat(2, 1)
    tokens, hidden = write(teacher, begin, 48, torch.tensor([0.0, 1.0]), torch.Generator().manual_seed(1))
    wanted = teacher.generate(
        begin[:1], do_sample=False, max_new_tokens=32, eos_token_id=None, pad_token_id=9, temperature=None, top_p=None
    )
    assert torch.equal(tokens[:1], wanted)
    assert not torch.equal(tokens[0], tokens[1])
    assert (teacher.lm_head(hidden) - teacher(tokens).logits).abs().max() < 1e-3


def test_rows_at_temperature_one_follow_the_law(teacher: LlamaForCausalLM, mixture: Mixture) -> None:
    """The first written token of 2,048 equal beginnings is drawn from the teacher's law there (chi-squared, 0.1 %)."""
    begin = torch.from_numpy(mixture.draw(4)).long()[None].repeat(2048, 1)
    tokens, _ = write(teacher, begin, 5, torch.ones(2048), torch.Generator().manual_seed(2))
    law = teacher(begin[:1]).logits[0, -1].softmax(-1)
    top = law.topk(15)
    expected = torch.cat([top.values, 1 - top.values.sum()[None]]) * 2048
    counts = torch.stack([(tokens[:, 4] == i).sum() for i in top.indices]).float()
    counts = torch.cat([counts, 2048 - counts.sum()[None]])
    enough = expected > 5
    assert float(((counts - expected) ** 2 / expected)[enough].sum()) < 37.7


def test_rounds_are_kept_and_go_on_where_they_stopped(
    teacher: LlamaForCausalLM, mixture: Mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.tiny.sampled.ROWS", 4)
    monkeypatch.setattr("tools.tiny.sampled.TOKENS", 20)
    whole, halves = Sampled(tmp_path / "whole"), Sampled(tmp_path / "halves")
    whole.extend(teacher, mixture, 2)
    halves.extend(teacher, mixture, 1)
    mixture.draw(100)
    halves.extend(teacher, mixture, 2)
    tokens, hidden = whole.read(2)
    assert tokens.shape == (8, 20)
    assert hidden.shape == (8, 20, 256)
    assert torch.equal(tokens, halves.read(2)[0])
    assert torch.equal(hidden, halves.read(2)[1])
    assert not torch.equal(tokens[:4], tokens[4:])


# ---------------------------------------------------------------------------------------------- teaching


def test_distances_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    cross, variation = distances(p, q.log())
    entropy = 1.5 * math.log(2)
    assert float(cross) == pytest.approx(entropy + 0.5 * math.log(2) - 0.25 * math.log(2))
    assert float(variation) == pytest.approx(0.25)


@pytest.mark.parametrize("width", [32, 256])
def test_a_draft_begins_with_the_teachers_embedding(teacher: LlamaForCausalLM, width: int) -> None:
    """As it is, or turned to its main directions: then inner products are the best ones of that rank."""
    draft = build(teacher, Shape(layers=1, width=width, heads=2, kv_heads=1, head_dim=16, intermediate=48))
    mine, taught = draft.model.embed_tokens.weight.detach(), teacher.model.embed_tokens.weight
    u, s, _v = torch.linalg.svd(taught, full_matrices=False)
    best = (u[:, :width] * s[:width] ** 2) @ u[:, :width].T
    assert (mine @ mine.T - best).abs().max() < 1e-3
    assert draft.lm_head.weight is draft.model.embed_tokens.weight
    assert draft.config.vocab_size == teacher.config.vocab_size


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_few_steps_bring_the_draft_nearer(teacher: LlamaForCausalLM, mixture: Mixture, weight: float) -> None:
    torch.manual_seed(0)
    draft = build(teacher, SHAPE)
    mixture.reseed(4)
    tokens = torch.from_numpy(mixture.draw(128)).long()[None]
    lesson = tokens, teacher.model(tokens).last_hidden_state
    optimizers = [optimizer for optimizer, _ in optimizers_of(draft)]
    kl, variation = measure(draft, teacher, lesson)
    for _ in range(12):
        learn(draft, teacher, optimizers, lesson, weight)
    after = measure(draft, teacher, lesson)
    assert after[0] < 0.8 * kl
    assert after[1] < 0.9 * variation


def test_what_is_measured_is_the_divergence(teacher: LlamaForCausalLM, mixture: Mixture) -> None:
    draft = build(teacher, SHAPE)
    tokens = torch.from_numpy(mixture.draw(32)).long()[None]
    p, q = teacher(tokens).logits[0].log_softmax(-1), draft(tokens).logits[0].log_softmax(-1).detach()
    wanted = float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))
    found = measure(draft, teacher, (tokens, teacher.model(tokens).last_hidden_state))
    assert found == pytest.approx((wanted, 0.5 * float((p.exp() - q.exp()).abs().sum(-1).mean())), rel=1e-4)


def test_the_course_warms_up_and_comes_down() -> None:
    course = Course()
    assert course.learning(0.0, 0) < 0.1
    assert course.learning(0.2, 1000) == 1.0
    assert course.learning(0.999, 1000) <= 0.02
    assert course.weight(0.1) == 0.0
    assert course.weight(0.9) == course.variation


# ---------------------------------------------------------------------------------------------- the figures


def test_figures_by_hand() -> None:
    """Two rows, of six tokens and of two."""
    rows = [[1.0, 0.5, 1.0, 0.0, 1.0, 1.0], [1.0, 1.0]]
    assert mean(rows) == round(6.5 / 8, 4)
    assert in_a_row(rows) == [round(6.5 / 8, 4), round((0.5 + 0.5 + 0 + 0 + 1 + 1) / 6, 4), 0.125, 0.0, 0.0]
    hits = [[1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0], [1.0, 1.0]]
    assert greedy_step(hits, 2) == 9 / 5  # 3, 2, 1, 1 and 2
    assert greedy_step(hits, 1) == 9 / 6  # 2, 1, 2, 1, 1 and 2


def test_a_row_counts_as_far_as_its_first_end(teacher: LlamaForCausalLM) -> None:
    assert ends_of(teacher) == {0, 4}
    values = torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.25, 0.125], [0.5, 0.25, 0.125]])
    said = torch.tensor([[9, 4, 0], [0, 7, 4], [7, 8, 9]])
    assert up_to_end(values, said, {0, 4}) == [[0.5, 0.25], [0.5], [0.5, 0.25, 0.125]]


def test_greedy_steps_are_those_of_a_drafting_loop(teacher: LlamaForCausalLM, mixture: Mixture) -> None:
    """Tokens of a step read off the hits are those counted by really drafting k tokens and testing them."""
    torch.manual_seed(1)
    draft = LlamaForCausalLM(LlamaConfig(**{**teacher.config.to_dict(), "num_hidden_layers": 1})).eval()
    draft.load_state_dict(teacher.state_dict(), strict=False)  # the teacher's first layer: sometimes right
    start, n = 12, 60
    begin = torch.from_numpy(mixture.draw(start)).long()[None]
    text, _ = write(teacher, begin, n, torch.zeros(1), torch.Generator())
    hits = draft(text).logits[:, start - 1 : -1].argmax(-1) == text[:, start:]
    assert 0 < int(hits.sum()) < hits.numel()
    for k in GUESSES:
        at, lengths = start, []
        while at < n:
            guessed = text[:, :at]
            for _ in range(k):
                guessed = torch.cat([guessed, draft(guessed).logits[:, -1:].argmax(-1)], 1)
            right = [int(a) == int(b) for a, b in zip(guessed[0, at:], text[0, at:], strict=False)]
            stood = right.index(False) if False in right else len(right)
            lengths.append(min(stood + 1, n - at))
            at += lengths[-1]
        assert greedy_step(hits.float().tolist(), k) == pytest.approx(sum(lengths) / len(lengths))
