"""A draft that goes on learning on its teacher's answers: what is asked, what is learnt of a row, the loss, runs that repeat."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tools.test_distil import corpus
from tools.tiny.asked import ANSWER, SAMPLED_AT, Answer, Course, batches, lesson, loss_of, material, teach
from tools.tiny.corpus import Corpus
from tools.tiny.distil import Shape, build
from tools.tiny.mixture import Mixture
from tools.tiny.requests import LONGEST, Requests

SHAPE = Shape(layers=1, width=32, heads=2, kv_heads=1, head_dim=16, intermediate=48)
SMALL = Course(asked=12, minutes=5.0, steps=3, seed=4)


__all__ = ["corpus"]  # a fixture


@pytest.fixture(scope="module")
def requests(shared: Callable[[str], Path], corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Requests:
    """Those of a small corpus; to tokenize all of it takes a minute."""
    return Requests(shared("data"), Mixture(corpus, tokenizer))


def test_answers_alone_are_learnt_from_the_states_that_they_were_drawn_from() -> None:
    """Rows of 5 and 3 tokens, answers of 2 and 1: learnt is what the tokens before each answer's say, and nothing behind."""
    states = torch.arange(3.0)[:, None].bfloat16()
    tokens, learnt, hidden = lesson([Answer([7, 8, 9, 1, 2], 3, states[:2]), Answer([7, 8, 3], 2, states[2:])])
    assert tokens.tolist() == [[7, 8, 9, 1, 2], [7, 8, 3, 0, 0]]
    assert learnt.int().tolist() == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]]
    assert hidden[:, 0].tolist() == [0, 1, 2]


def test_the_loss_by_hand() -> None:
    """Two tokens at odds of 3 and of 1: cross-entropy at 1 is ln 2; at 0.8 the odds of 3 are 3^1.25, so the share is 0.798."""
    teacher, draft = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    share = 3.0 ** (1 / SAMPLED_AT) / (1 + 3.0 ** (1 / SAMPLED_AT))
    assert float(loss_of(teacher, draft, 0.0)) == pytest.approx(math.log(2))
    assert float(loss_of(teacher, draft, 0.25)) == pytest.approx(0.75 * math.log(2) + 0.25 * (share - 0.5))


def test_every_answer_comes_once_before_any_comes_again() -> None:
    rows = [Answer([n] * (5 + n * 37 % 600), 2, torch.zeros(0, 1)) for n in range(40)]
    source, seen = batches(rows, 1), list[int]()
    while len(seen) < 80:
        seen += [row.ids[0] for row in next(source)]
    assert sorted(seen[:40]) == sorted(seen[40:80]) == list(range(40))


def test_a_run_repeats_and_its_states_are_the_teachers(
    requests: Requests, bundled: Path, teacher: LlamaForCausalLM, tmp_path: Path
) -> None:
    rows = material(tmp_path, teacher, bundled, requests, SMALL, lambda _: None)
    again = material(tmp_path, teacher, bundled, requests, SMALL, lambda text: pytest.fail(text))
    assert [row.ids for row in again] == [row.ids for row in rows]
    assert [row.ids[: row.start] for row in rows] == requests.draw(12, 4)
    greedy = rows[3]  # each fourth answer
    with torch.no_grad():
        said = teacher.generate(
            torch.tensor([greedy.ids[: greedy.start]]), do_sample=False, max_new_tokens=ANSWER, attention_mask=None
        )
    assert greedy.ids == said[0].tolist()
    agrees = teacher.lm_head(greedy.hidden.float()).argmax(-1) == torch.tensor(greedy.ids[greedy.start :])
    assert float(agrees.float().mean()) > 0.95  # all but for what bfloat16 leaves undecided
    drafts = []
    for _ in range(2):
        torch.manual_seed(0)
        draft = build(teacher, SHAPE)
        assert teach(draft, teacher, rows, SMALL, lambda _: None, lambda: None)["steps"] == 3
        drafts.append(draft)
    for one, other in zip(*(draft.parameters() for draft in drafts), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.long)], ids=["small", "whole"])
def test_nothing_of_spec_bench_and_no_held_out_novel_is_asked(
    shared: Callable[[str], Path], requests: Requests, tokenizer: PreTrainedTokenizerFast, whole: bool
) -> None:
    """Of the small corpus all but novels, stories and maths is what is asked with the whole one."""
    data = shared("data")
    corpus = Corpus(data)
    asks = (Requests(data, Mixture(corpus, tokenizer)) if whole else requests).draw(1500, 0)
    assert max(map(len, asks)) <= LONGEST
    assert sum(tokenizer.decode(ask).startswith("<|user|>") for ask in asks) > 900
    asked = " ".join(" ".join(tokenizer.decode(ask).split()) for ask in asks)
    lines = (data / "eval" / "spec-bench" / "question.jsonl").read_text(encoding="utf8").splitlines()
    for line in lines:
        words = " ".join(json.loads(line)["turns"][0].split())
        assert words[: min(len(words), 100)] not in asked
    for novel in corpus.held_out():
        words = " ".join(novel.split())
        assert not [at for at in range(0, len(words) - 60, 60) if words[at : at + 60] in asked]
