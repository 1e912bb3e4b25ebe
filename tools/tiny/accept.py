"""How much of a teacher's own text a draft of it would have guessed.

Three kinds of prompts, none of them trained on: beginnings from the held-out novels, requests in the chat format about them,
and recall windows over them.  The teacher goes on by itself, and the draft reads along:

    greedy     the teacher's greedy text.  A guess stands where the draft's likeliest token is the teacher's; since all guesses
               before a tested one stood, reading along sees exactly what drafting would have seen.
    sampled    the teacher's text at temperature 1.  overlap is the mean of sum(min(p, q)), the chance that one guess stands.
               That the first j guesses stand has the chance E[product of min(1, q/p) over j tokens drawn from p] (both by
               Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192).

Tokens of a step: the guesses that stood and the one token of the teacher that always follows.

Legend.  B: prompts.  P: tokens of a prompt.  N: tokens of the whole rows.  V: vocabulary.  k: guesses of a step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tools.tiny.corpus import Corpus
from tools.tiny.mixture import Mixture
from tools.tiny.sampled import write
from weft.fidelity.recall import OWNERS, THINGS

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

GUESSES = (2, 3, 4, 5)
KINDS = ("novels", "chat", "recall")
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 96, 96
CHAT_TOKENS = 24
SEED = 5
REQUESTS = (
    "Write a story that begins: {}",
    "Tell me about this: {}",
    "What happens after this? {}",
    "How many are there in this? {}",
)


class Prompts:
    """Prompts of each kind from the held-out novels, as rows of equal length, the same ones each time."""

    def __init__(self, corpus: Corpus, mixture: Mixture) -> None:
        self.mixture, self.place = mixture, np.random.default_rng(SEED)
        self.novels = [mixture.encode(text) for text in corpus.held_out()]

    def excerpt(self, n: int) -> list[int]:
        novel = self.novels[int(self.place.integers(len(self.novels)))]
        start = int(self.place.integers(len(novel) - n))
        return [int(token) for token in novel[start : start + n]]

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self.mixture.encode(text)]

    def one(self, kind: str) -> list[int]:
        """A prompt of any length; `rows` cuts it at the left to PROMPT_TOKENS."""
        if kind == "novels":
            return self.excerpt(PROMPT_TOKENS)
        if kind == "chat":
            text = self.mixture.tokenizer.decode(self.excerpt(CHAT_TOKENS))
            request = REQUESTS[int(self.place.integers(len(REQUESTS)))].format(text)
            return self.excerpt(PROMPT_TOKENS) + self.encode(f"<|end|><|user|>{request}<|end|><|assistant|>")
        owner, thing = self.pick(OWNERS), self.pick(THINGS)
        number = "".join(self.pick("0123456789") for _ in range(4))
        fact = self.encode(f"\n\nThe number of {owner}'s {thing} is {number}.\n\n")
        question = self.encode(f"<|user|>What is the number of {owner}'s {thing}?<|end|><|assistant|>")
        room = PROMPT_TOKENS - len(fact) - len(question)
        before = int(self.place.integers(room // 2))
        return self.excerpt(before) + fact + self.excerpt(room - before) + question

    def pick(self, choices: Sequence[str]) -> str:
        return choices[int(self.place.integers(len(choices)))]

    def rows(self, kind: str, count: int) -> Tensor:
        self.place = np.random.default_rng((SEED, KINDS.index(kind)))
        return torch.tensor([self.one(kind)[-PROMPT_TOKENS:] for _ in range(count)])


@torch.no_grad()
def judge(draft: LlamaForCausalLM, teacher: LlamaForCausalLM, prompt_BP: Tensor) -> dict[str, Any]:
    """Both measures over the teacher's continuations of the prompts."""
    rows, start = prompt_BP.shape
    n = start + NEW_TOKENS
    noise = torch.Generator().manual_seed(SEED)
    tokens, _ = write(teacher, prompt_BP, n, torch.zeros(rows), noise)
    hits_BN = draft(tokens).logits[:, start - 1 : -1].argmax(-1) == tokens[:, start:]
    tokens, hidden = write(teacher, prompt_BP, n, torch.ones(rows), noise)
    p = teacher.lm_head(hidden[:, start - 1 : -1]).softmax(-1)
    q = draft(tokens).logits[:, start - 1 : -1].softmax(-1)
    drawn = tokens[:, start:, None]
    kept_BN = (q.gather(-1, drawn) / p.gather(-1, drawn)).clamp(max=1)[..., 0]
    return {
        "greedy": {
            "accepted": round(float(hits_BN.float().mean()), 4),
            "accepted_in_a_row": in_a_row(hits_BN.float()),
            "tokens_per_step": {str(k): round(greedy_step(hits_BN.tolist(), k), 3) for k in GUESSES},
        },
        "sampled": {
            "overlap": round(float(torch.minimum(p, q).sum(-1).mean()), 4),
            "accepted_in_a_row": in_a_row(kept_BN),
            "tokens_per_step": {str(k): round(1 + sum(in_a_row(kept_BN)[:k]), 3) for k in GUESSES},
        },
    }


def in_a_row(chance_BN: Tensor) -> list[float]:
    """The chance that the first j guesses all stand, for j = 1, 2, ..., over steps that begin anywhere."""
    most = max(GUESSES)
    windows = chance_BN.unfold(1, most, 1)
    return [round(float(x), 4) for x in windows.cumprod(-1).mean((0, 1))]


def greedy_step(hits_BN: Sequence[Sequence[bool]], k: int) -> float:
    """Mean tokens of a step with k guesses, step after step along each row."""
    tokens = steps = 0
    for row in hits_BN:
        at = 0
        while at + k < len(row):  # a step that the row's end would cut off says nothing
            stood = next((i for i, hit in enumerate(row[at : at + k]) if not hit), k)
            at, tokens, steps = at + stood + 1, tokens + stood + 1, steps + 1
    return tokens / max(1, steps)


def report(
    draft: LlamaForCausalLM, teacher: LlamaForCausalLM, prompts: Prompts, count: int = PROMPTS
) -> dict[str, Any]:
    draft.eval()
    return {kind: judge(draft, teacher, prompts.rows(kind, count)) for kind in KINDS}


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
    prompts = Prompts(corpus, Mixture(corpus, AutoTokenizer.from_pretrained(options.teacher)))
    found = report(draft, teacher, prompts, options.prompts)
    (options.out / "acceptance.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
    print("\n".join(lines(found)))
    return 0
