"""A draft of the bundled model: a thin Llama over the same vocabulary, taught with the model's own law.

    python -m tools.train_tiny draft DATA OUT --teacher MODEL --minutes 33

The teacher's whole law at every position is the target, on windows of the mixture and on texts that the teacher wrote itself
(`sampled.py`).  Held-out novels are in neither.  What is minimized is the divergence KL(teacher, draft) and, for the last part
of the time, in part the distance of total variation, which is exactly the chance that a guess falls (Zhou et al.,
"DistillSpec", arXiv:2310.08461).  The embedding begins as the teacher's, turned to its main directions where the draft is
narrower.

Legend.  R: positions of a step.  V: vocabulary.  D: the teacher's width.  B, N: rows of a step and their tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tools.tiny.accept import Prompts, lines, report
from tools.tiny.corpus import Corpus
from tools.tiny.mixture import Mixture
from tools.tiny.muon import Muon
from tools.tiny.sampled import TOKENS, Sampled
from tools.tiny.teaching import Say, descend, logged, set_rates

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

MATRIX_LR, EMBEDDING_LR, NORM_LR = 0.02, 1e-3, 3e-3
WARM_UP_STEPS = 30
STEP_TOKENS = 1024
WINDOWS = (256, 512, 1024)
"""Tokens of the mixture's windows, in turn: mostly short ones, and some as long as the teacher has seen."""
OWN_SHARE = 0.5
"""Of the steps: on the teacher's own texts."""
LOG_STEPS = 20
CHECKPOINT_S = 180.0
MIXTURE_SEED = 77


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the draft.  The defaults are those that the one in the package began with (`asked.py`): 2.98 MB in bfloat16."""

    layers: int = 1
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 320


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How it is taught.  rounds: of the teacher's own texts.  variation: weight of total variation in the last part."""

    minutes: float = 33.0
    rounds: int = 12
    flat: float = 0.4
    variation_from: float = 0.7
    variation: float = 0.5
    threads: int = 2

    def learning(self, done: float, step: int) -> float:
        """Factor on the learning rates when a share `done` of the time has passed: warm-up, flat, then linear decay."""
        warm = min(1.0, (step + 1) / WARM_UP_STEPS)
        return warm * (1.0 if done < self.flat else max(0.01, (1 - done) / (1 - self.flat)))

    def weight(self, done: float) -> float:
        """Of total variation in the loss."""
        return self.variation if done >= self.variation_from else 0.0


def build(teacher: LlamaForCausalLM, shape: Shape) -> LlamaForCausalLM:
    """A draft with the teacher's vocabulary, positions and special tokens, and its embedding to begin with."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            **teacher.config.to_dict(),
            "hidden_size": shape.width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.intermediate,
            "dtype": "float32",
        }
    )
    draft = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in draft.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                # Layers that speak louder than the embedding: else the likeliest next token were the newest one again.
                weight.normal_(std=weight.size(1) ** -0.5)
        taught = teacher.model.embed_tokens.weight
        if shape.width == taught.size(1):
            draft.model.embed_tokens.weight.copy_(taught)
            draft.model.norm.weight.copy_(teacher.model.norm.weight)
        else:
            directions = torch.linalg.svd(taught, full_matrices=False).Vh[: shape.width]
            draft.model.embed_tokens.weight.copy_(taught @ directions.T)
    return draft


class Lessons:
    """Steps' material: tokens [B, N] and the teacher's final hidden states there [B, N, D]."""

    def __init__(self, teacher: LlamaForCausalLM, mixture: Mixture, own: tuple[Tensor, Tensor], seed: int = 0) -> None:
        self.teacher, self.mixture = teacher, mixture
        self.tokens, self.hidden = own
        self.order, self.at = torch.randperm(len(self.tokens)), 0
        self.place = np.random.default_rng(seed)
        self.drawn = 0
        mixture.reseed(MIXTURE_SEED + seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        return self.own(STEP_TOKENS // TOKENS) if self.place.random() < OWN_SHARE else self.fresh()

    def own(self, rows: int) -> tuple[Tensor, Tensor]:
        """The teacher's own texts, each once before any comes again."""
        if self.at + rows > len(self.order):
            self.order, self.at = torch.randperm(len(self.tokens)), 0
        chosen = self.order[self.at : self.at + rows]
        self.at += rows
        return self.tokens[chosen].long(), self.hidden[chosen].float()

    @torch.no_grad()
    def fresh(self) -> tuple[Tensor, Tensor]:
        """Windows of the mixture, and the teacher's states over them."""
        n = WINDOWS[self.drawn % len(WINDOWS)]
        self.drawn += 1
        tokens = torch.from_numpy(np.stack([self.mixture.draw(n) for _ in range(STEP_TOKENS // n)])).long()
        return tokens, self.teacher.model(tokens, use_cache=False).last_hidden_state


def laws(teacher: LlamaForCausalLM, hidden_BND: Tensor) -> Tensor:
    """The teacher's law at every position, [R, V]."""
    with torch.no_grad():
        law: Tensor = teacher.lm_head(hidden_BND.flatten(0, 1)).softmax(-1)
    return law


def distances(p_RV: Tensor, logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the draft's law to the teacher's, and their total variation; means over positions."""
    log_q = logits_RV.log_softmax(-1)
    cross = -(p_RV * log_q).sum(-1).mean()
    return cross, 0.5 * (p_RV - log_q.exp()).abs().sum(-1).mean()


def learn(
    draft: LlamaForCausalLM,
    teacher: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    lesson: tuple[Tensor, Tensor],
    weight: float,
) -> None:
    """One step.  The teacher's own entropy is left out of the loss: it is dear to compute and has no gradient."""
    tokens, hidden = lesson
    p, logits = laws(teacher, hidden), draft(tokens, use_cache=False).logits.flatten(0, 1)
    if weight:
        cross, variation = distances(p, logits)
        loss = (1 - weight) * cross + weight * variation
    else:
        loss = torch.nn.functional.cross_entropy(logits, p)
    descend(draft, optimizers, loss)


@torch.no_grad()
def measure(draft: LlamaForCausalLM, teacher: LlamaForCausalLM, lesson: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """(KL in nats, total variation) on a lesson."""
    tokens, hidden = lesson
    p, logits = laws(teacher, hidden), draft(tokens, use_cache=False).logits.flatten(0, 1)
    cross, variation = distances(p, logits)
    return float(cross + torch.xlogy(p, p).sum(-1).mean()), float(variation)


def optimizers_of(draft: LlamaForCausalLM) -> list[tuple[torch.optim.Optimizer, float]]:
    """Each with its full learning rate."""
    named = dict(draft.named_parameters())
    embedding = [p for name, p in named.items() if "embed" in name]
    norms = [p for p in named.values() if p.ndim == 1]
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
    return [
        (Muon(matrices, MATRIX_LR), MATRIX_LR),
        (torch.optim.AdamW(embedding, EMBEDDING_LR, betas=(0.9, 0.98), weight_decay=0), EMBEDDING_LR),
        (torch.optim.AdamW(norms, NORM_LR, betas=(0.9, 0.98), weight_decay=0), NORM_LR),
    ]


def train(
    draft: LlamaForCausalLM,
    teacher: LlamaForCausalLM,
    lessons: Lessons,
    course: Course,
    say: Say,
    keep: Callable[[], None],
) -> None:
    """Teach for course.minutes; `keep` is called every few minutes."""
    pairs = optimizers_of(draft)
    draft.train()
    started, kept, step, positions = time.monotonic(), 0.0, 0, 0
    while (elapsed := time.monotonic() - started) < course.minutes * 60:
        done = elapsed / (course.minutes * 60)
        set_rates(pairs, course.learning(done, step))
        lesson = lessons.draw()
        if step % LOG_STEPS == 0:  # before the lesson is learnt
            kl, variation = measure(draft, teacher, lesson)
            speed = positions / (time.monotonic() - started)
            say(
                f"step {step} tokens {positions} KL {kl:.4f} variation {variation:.4f} tokens/s {speed:.0f} "
                f"minute {elapsed / 60:.1f}"
            )
        learn(draft, teacher, [optimizer for optimizer, _ in pairs], lesson, course.weight(done))
        step, positions = step + 1, positions + lesson[0].numel()
        if elapsed - kept > CHECKPOINT_S:
            kept = elapsed
            keep()
    say(f"taught {positions} tokens in {step} steps")


def main(argv: Sequence[str]) -> int:
    from transformers import AutoTokenizer, LlamaForCausalLM

    shape, course = Shape(), Course()
    parser = argparse.ArgumentParser(prog="train_tiny draft", description="Teach a draft of a model.")
    parser.add_argument("data", type=Path, help="folder of texts")
    parser.add_argument("out", type=Path, help="folder of the draft")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the model that the draft will serve")
    parser.add_argument("--minutes", type=float, default=course.minutes, help="time to teach for, after the sampling")
    parser.add_argument("--rounds", type=int, default=course.rounds, help="rounds of the teacher's own texts")
    parser.add_argument("--samples", type=Path, help="folder that keeps those texts; OUT/sampled if not given")
    parser.add_argument("--variation", type=float, default=course.variation, help="weight of total variation, 0 to 1")
    parser.add_argument("--threads", type=int, default=course.threads)
    parser.add_argument("--init", type=Path, help="checkpoint folder to go on from")
    for name in Shape.__dataclass_fields__:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(shape, name))
    given = vars(parser.parse_args(argv))
    shape = Shape(**{name: given[name] for name in Shape.__dataclass_fields__})
    course = Course(**{name: given[name] for name in ("minutes", "rounds", "variation", "threads")})
    out: Path = given["out"]
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(course.threads)
    torch.manual_seed(0)
    teacher = LlamaForCausalLM.from_pretrained(given["teacher"], dtype=torch.float32).eval().requires_grad_(False)
    corpus = Corpus(given["data"])
    mixture = Mixture(corpus, AutoTokenizer.from_pretrained(given["teacher"]))
    samples = Sampled(given["samples"] or out / "sampled")
    samples.extend(teacher, mixture, course.rounds)
    if given["init"]:
        draft = LlamaForCausalLM.from_pretrained(given["init"], dtype=torch.float32)
    else:
        draft = build(teacher, shape)
    with logged(out / "train.log") as say:

        def keep() -> None:
            draft.save_pretrained(out / "checkpoint")

        say(f"{shape} {course} parameters {sum(p.numel() for p in draft.parameters())}")
        train(draft, teacher, Lessons(teacher, mixture, samples.read(course.rounds)), course, say, keep)
        draft.to(torch.bfloat16).save_pretrained(out)
        for line in lines(report(draft.float(), teacher, Prompts(corpus, mixture.tokenizer))):
            say(line)
    return 0
