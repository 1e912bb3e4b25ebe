"""How much of a teacher's own text a draft of it would have guessed.

Three kinds of prompts, none of them trained on: beginnings from the held-out novels, requests in the chat format about them,
and recall windows over them.  The teacher goes on by itself, and the draft reads along:

    greedy     the teacher's greedy text.  A guess stands where the draft's likeliest token is the teacher's; since all guesses
               before a tested one stood, reading along sees exactly what drafting would have seen.
    sampled    the teacher's text at temperature 1.  overlap is the mean of sum(min(p, q)), the chance that one guess stands.
               That the first j guesses stand has the chance E[product of min(1, q/p) over j tokens drawn from p] (both by
               Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192).

Tokens of a step: the guesses that stood and the one token of the teacher that always follows.  A row counts up to the token
that ends an answer, and no further, as an engine would stop there.

Legend.  B: prompts.  P: tokens of a prompt.  N: tokens of the whole rows.  V: vocabulary.  k: guesses of a step.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tools.tiny.corpus import Corpus
from tools.tiny.sampled import write
from weft.fidelity.recall import OWNERS, THINGS

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

GUESSES = (2, 3, 4, 5)
LENGTHS = {"novels": 96, "chat": 32, "recall": 96}
"""Tokens of a prompt of each kind."""
PROMPTS, NEW_TOKENS = 64, 96
SEED = 5
REQUESTS = ("Write a story that begins: ", "Tell me about this: ", "What happens after this? ", "How many are there? ")


class Prompts:
    """Prompts of each kind from the held-out novels, as rows of equal length, the same ones each time."""

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.place = tokenizer, np.random.default_rng(SEED)
        self.novels = [self.encode(text) for text in corpus.held_out()]

    def excerpt(self, n: int) -> list[int]:
        novel = self.novels[int(self.place.integers(len(self.novels)))]
        start = int(self.place.integers(len(novel) - n))
        return novel[start : start + n]

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text)["input_ids"]]

    def one(self, kind: str) -> list[int]:
        room = LENGTHS[kind]
        if kind == "novels":
            return self.excerpt(room)
        if kind == "chat":
            head, tail = self.encode(f"<|user|>{self.pick(REQUESTS)}"), self.encode("<|end|><|assistant|>")
            return head + self.excerpt(room - len(head) - len(tail)) + tail
        owner, thing = self.pick(OWNERS), self.pick(THINGS)
        number = "".join(self.pick("0123456789") for _ in range(4))
        fact = self.encode(f"\n\nThe number of {owner}'s {thing} is {number}.\n\n")
        question = self.encode(f"<|user|>What is the number of {owner}'s {thing}?<|end|><|assistant|>")
        room -= len(fact) + len(question)
        before = int(self.place.integers(room))
        return self.excerpt(before) + fact + self.excerpt(room - before) + question

    def pick(self, choices: Sequence[str]) -> str:
        return choices[int(self.place.integers(len(choices)))]

    def rows(self, kind: str, count: int) -> Tensor:
        self.place = np.random.default_rng((SEED, list(LENGTHS).index(kind)))
        return torch.tensor([self.one(kind) for _ in range(count)])


@dataclass(frozen=True, slots=True)
class Spoken:
    """What a teacher says to prompts of `start` tokens: greedily, and at temperature 1 with its states there, [B, N, D]."""

    start: int
    greedy_BN: Tensor
    sampled_BN: Tensor
    hidden_BND: Tensor


def spoken(teacher: LlamaForCausalLM, prompt_BP: Tensor) -> Spoken:
    rows, start = prompt_BP.shape
    n, noise = start + NEW_TOKENS, torch.Generator().manual_seed(SEED)
    greedy, _ = write(teacher, prompt_BP, n, torch.zeros(rows), noise)
    return Spoken(start, greedy, *write(teacher, prompt_BP, n, torch.ones(rows), noise))


@torch.no_grad()
def judge(draft: LlamaForCausalLM, teacher: LlamaForCausalLM, texts: Spoken) -> dict[str, Any]:
    """Both measures over the teacher's continuations of prompts."""
    start = texts.start
    said = texts.greedy_BN[:, start:]
    guessed = draft(texts.greedy_BN).logits[:, start - 1 : -1].argmax(-1)
    hits = up_to_end((guessed == said).float(), said, ends_of(teacher))
    said = texts.sampled_BN[:, start:]
    p = teacher.lm_head(texts.hidden_BND[:, start - 1 : -1]).softmax(-1)
    q = draft(texts.sampled_BN).logits[:, start - 1 : -1].softmax(-1)
    overlap = up_to_end(torch.minimum(p, q).sum(-1), said, ends_of(teacher))
    kept_BN = (q.gather(-1, said[..., None]) / p.gather(-1, said[..., None])).clamp(max=1)[..., 0]
    kept = in_a_row(up_to_end(kept_BN, said, ends_of(teacher)))
    return {
        "greedy": {
            "tokens": sum(map(len, hits)),
            "accepted": mean(hits),
            "accepted_in_a_row": in_a_row(hits),
            "tokens_per_step": {str(k): round(greedy_step(hits, k), 3) for k in GUESSES},
        },
        "sampled": {
            "tokens": sum(map(len, overlap)),
            "overlap": mean(overlap),
            "accepted_in_a_row": kept,
            "tokens_per_step": {str(k): round(1 + sum(kept[:k]), 3) for k in GUESSES},
        },
    }


def ends_of(teacher: LlamaForCausalLM) -> set[int]:
    """Tokens that end an answer of the teacher's."""
    config: Any = teacher.generation_config
    ends = config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def up_to_end(values_BN: Tensor, said_BN: Tensor, ends: set[int]) -> list[list[float]]:
    """Each row's values as far as its first end, which is the last that counts."""
    found = []
    for values, said in zip(values_BN.tolist(), said_BN.tolist(), strict=True):
        stop = next((i for i, token in enumerate(said) if token in ends), len(said) - 1)
        found.append(values[: stop + 1])
    return found


def mean(rows: Sequence[Sequence[float]]) -> float:
    return round(sum(map(sum, rows)) / max(1, sum(map(len, rows))), 4)


def in_a_row(rows: Sequence[Sequence[float]]) -> list[float]:
    """The chance that the first j guesses all stand, for j = 1, 2, ..., over steps that begin anywhere and have j to guess."""
    found = []
    for j in range(1, max(GUESSES) + 1):
        runs = [math.prod(row[at : at + j]) for row in rows for at in range(len(row) - j + 1)]
        found.append(round(sum(runs) / max(1, len(runs)), 4))
    return found


def greedy_step(rows: Sequence[Sequence[float]], k: int) -> float:
    """Mean tokens of a step with k guesses, step after step along each row of hits; the last may be cut short by its end."""
    tokens = steps = 0
    for row in rows:
        at = 0
        while at < len(row):
            stood = next((i for i, hit in enumerate(row[at : at + k]) if not hit), k)
            stop = min(at + stood + 1, len(row))
            at, tokens, steps = stop, tokens + stop - at, steps + 1
    return tokens / max(1, steps)


def report(
    draft: LlamaForCausalLM, teacher: LlamaForCausalLM, prompts: Prompts, count: int = PROMPTS
) -> dict[str, Any]:
    draft.eval()
    return {kind: judge(draft, teacher, spoken(teacher, prompts.rows(kind, count))) for kind in LENGTHS}


def lines(found: dict[str, Any]) -> Iterator[str]:
    for kind, both in found.items():
        greedy, sampled = both["greedy"], both["sampled"]
        yield (
            f"{kind}: greedy {greedy['accepted']:.3f}, tokens per step {greedy['tokens_per_step']}; "
            f"sampled overlap {sampled['overlap']:.3f}, tokens per step {sampled['tokens_per_step']}"
        )


def main(argv: Sequence[str]) -> int:
    from transformers import AutoTokenizer, LlamaForCausalLM

    parser = argparse.ArgumentParser(prog="train_tiny accept", description="Judge a draft by its teacher's own text.")
    parser.add_argument("data", type=Path, help="folder of texts")
    parser.add_argument("out", type=Path, help="folder of the draft; acceptance.json is written there")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the model that the draft serves")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="prompts of each kind")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    teacher = LlamaForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).eval()
    draft = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    corpus = Corpus(options.data)
    prompts = Prompts(corpus, AutoTokenizer.from_pretrained(options.teacher))
    found = report(draft, teacher, prompts, options.prompts)
    (options.out / "acceptance.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
    print("\n".join(lines(found)))
    return 0
