"""Clover's heads for a model (`draft=clover`): taught with the model's own texts and its law over them, the model frozen.

    python -m tools.train_tiny heads DATA OUT --teacher MODEL --minutes 8

The texts are those that a draft is taught with (`sampled.py`): the teacher's own, from beginnings out of the mixture, kept with
its hidden states, so no pass of the teacher is needed while teaching.  Held-out novels are in none of them.  A lesson is a place
t of a text: the states up to t, and the tokens t + 1, t + 2, ...; head i is to give the teacher's law after token t + i.
Minimized is the divergence from that law, and in the last part in part the distance of total variation, the chance that a guess
falls.
OUT is a safetensors file, in bfloat16.

Legend.  P: places of a lesson.  N: states that are seen.  K: heads.  D: inner size.  W: the teacher's width.  V: vocabulary.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from tools.tiny.accept import Prompts
from tools.tiny.corpus import SPECIAL_TOKENS, Corpus
from tools.tiny.mixture import Mixture
from tools.tiny.muon import Muon
from tools.tiny.sampled import Sampled, write
from weft.draft._weights import Kind, marked
from weft.draft.clover import HEADS, KIND, augmented, head, keys, shapes

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

MATRIX_LR, OTHER_LR = 0.02, 3e-3
WARM_UP_STEPS = 20
LOG_STEPS = 100
SHORT = 0.25
"""Of the places: those that see less than a whole window, as a sequence does that has just begun."""
KINDS = ("novels", "chat")
PROMPTS, NEW_TOKENS = 32, 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """inner, window: sizes of the heads.  places: of a step.  heads: that are taught.  variation: its weight in the last part."""

    minutes: float = 8.0
    inner: int = 64
    window: int = 16
    places: int = 256
    heads: int = 4
    rounds: int = 10
    flat: float = 0.4
    variation_from: float = 0.6
    variation: float = 0.5
    threads: int = 1

    def learning(self, done: float, step: int) -> float:
        """Factor on the learning rates when a share `done` of the time has passed: warm-up, flat, then linear decay."""
        warm = min(1.0, (step + 1) / WARM_UP_STEPS)
        return warm * (1.0 if done < self.flat else max(0.02, (1 - done) / (1 - self.flat)))


@dataclass(slots=True)
class Lesson:
    """states [P, N, W], seen [P, N], tokens [P, K]; wanted [P, K, W]: the teacher's states whose laws the heads are to give."""

    states: Tensor
    seen: Tensor
    tokens: Tensor
    wanted: Tensor


def lesson(tokens_BN: Tensor, hidden_BND: Tensor, row_P: Tensor, at_P: Tensor, window: int, heads: int) -> Lesson:
    """Of the places (row, at) of texts; at + heads must be inside."""
    back = at_P[:, None] + torch.arange(1 - window, 1)
    ahead = at_P[:, None] + torch.arange(1, heads + 1)
    row = row_P[:, None]
    return Lesson(
        hidden_BND[row, back.clamp(min=0)].float(), back >= 0, tokens_BN[row, ahead].long(),
        hidden_BND[row, ahead].float(),
    )  # fmt: skip


def fresh(width: int, course: Course) -> dict[str, Tensor]:
    """Weights to begin with: what blocks add is small, and the first laws are nearly flat."""
    weights = {}
    for name, shape in shapes(width, course.inner, course.window).items():
        scale = 0.0 if name.endswith("near") else 0.1 if name.endswith((".o", ".down")) else 0.3 if name == "out" else 1
        weights[name] = (torch.randn(shape) * scale * shape[-1] ** -0.5).requires_grad_()
    return weights


def outputs(weights: Mapping[str, Tensor], teacher: LlamaForCausalLM, given: Lesson) -> Tensor:
    """What the teacher's head makes logits of, of every head, [P * K, W]."""
    u = given.states @ weights["in"].T
    state = augmented(weights, u[:, -1], keys(weights, "augment", u), given.seen)
    kv = keys(weights, "head", teacher.model.embed_tokens(given.tokens) @ weights["token"].T)
    out = []
    for i in range(given.tokens.size(1)):
        state, o = head(weights, state, kv[:, : i + 1])
        out.append(o)
    return torch.stack(out, 1).flatten(0, 1) * teacher.model.norm.weight


def product(teacher: LlamaForCausalLM, states: Tensor) -> Tensor:
    """With the teacher's head; its inputs rounded, which is three times as fast and moves a law by a thousandth."""
    with torch.autocast("cpu", torch.bfloat16):
        logits: Tensor = teacher.lm_head(states)
    return logits.float()


def loss_of(p_RV: Tensor, logits_RV: Tensor, variation: float) -> Tensor:
    """The teacher's own entropy is left out: it has no gradient."""
    if not variation:
        return torch.nn.functional.cross_entropy(logits_RV, p_RV)
    log_q = logits_RV.log_softmax(-1)
    cross = -(p_RV * log_q).sum(-1).mean()
    return (1 - variation) * cross + variation * 0.5 * (p_RV - log_q.exp()).abs().sum(-1).mean()


def train(
    weights: dict[str, Tensor],
    teacher: LlamaForCausalLM,
    texts: tuple[Tensor, Tensor],
    course: Course,
    say: Callable[[str], None],
) -> None:
    tokens, hidden = texts
    noise = torch.Generator().manual_seed(0)
    matrices = [w for name, w in weights.items() if not name.endswith("near")]
    others = [w for name, w in weights.items() if name.endswith("near")]
    pairs: list[tuple[torch.optim.Optimizer, float]] = [
        (Muon(matrices, MATRIX_LR), MATRIX_LR),
        (torch.optim.AdamW(others, OTHER_LR, weight_decay=0), OTHER_LR),
    ]
    started, step = time.monotonic(), 0
    while (elapsed := time.monotonic() - started) < course.minutes * 60:
        done = elapsed / (course.minutes * 60)
        for optimizer, base in pairs:
            for group in optimizer.param_groups:
                group["lr"] = base * course.learning(done, step)
        row = torch.randint(len(tokens), (course.places,), generator=noise)
        at = torch.randint(tokens.size(1) - course.heads, (course.places,), generator=noise)
        given = lesson(tokens, hidden, row, at, course.window, course.heads)
        least = torch.randint(course.window, (course.places, 1), generator=noise)
        whole = torch.rand(course.places, 1, generator=noise) >= SHORT
        given.seen &= whole | (torch.arange(course.window) >= least)
        with torch.no_grad():
            p = product(teacher, given.wanted.flatten(0, 1)).softmax(-1)
        logits = product(teacher, outputs(weights, teacher, given))
        loss = loss_of(p, logits, course.variation if done >= course.variation_from else 0.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for optimizer, _ in pairs:
            optimizer.step()
            optimizer.zero_grad()
        if step % LOG_STEPS == 0:
            overlap = torch.minimum(p, logits.detach().softmax(-1)).sum(-1).view(-1, course.heads).mean(0)
            say(f"step {step} minute {elapsed / 60:.1f} loss {loss.item():.3f} overlap {three(overlap)}")
        step += 1
    say(f"taught {step * course.places} places in {step} steps")


@torch.no_grad()
def judge(
    weights: Mapping[str, Tensor], teacher: LlamaForCausalLM, prompt_BP: Tensor, window: int, heads: int
) -> dict[str, list[float]]:
    """By "greedy" and "sampled" (temperature 1), for each head how often its guess stands where those before it stood."""
    found = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        rows, start = prompt_BP.shape
        n = start + NEW_TOKENS
        tokens, hidden = write(
            teacher, prompt_BP, n, torch.full((rows,), temperature), torch.Generator().manual_seed(5)
        )
        at = torch.arange(start - 1, n - heads)
        row, at = torch.arange(rows).repeat_interleave(len(at)), at.repeat(rows)
        total = torch.zeros(heads)
        for some, here in zip(row.split(256), at.split(256), strict=True):
            given = lesson(tokens, hidden, some, here, window, heads)
            p, q = (teacher.lm_head(x) for x in (given.wanted.flatten(0, 1), outputs(weights, teacher, given)))
            if temperature:
                stand = torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1)
            else:
                stand = (p.argmax(-1) == q.argmax(-1)).float()
            total += stand.view(-1, heads).sum(0)
        found[name] = (total / len(row)).tolist()
    return found


def save(weights: Mapping[str, Tensor], teacher: LlamaForCausalLM, path: Path, kind: Kind) -> None:
    vocab = int(teacher.config.vocab_size)
    tensors = {name: w.detach().contiguous() for name, w in weights.items()}
    tensors["mark"] = teacher.model.embed_tokens.weight.detach()[marked(vocab)].bfloat16().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"kind": kind.name, "vocab": str(vocab)})


def three(x: Tensor | Sequence[float]) -> str:
    return " ".join(f"{float(v):.3f}" for v in x)


def main(argv: Sequence[str]) -> int:
    from transformers import AutoTokenizer, LlamaForCausalLM

    course = Course()
    parser = argparse.ArgumentParser(prog="train_tiny heads", description="Teach Clover's heads for a model.")
    parser.add_argument("data", type=Path, help="folder of texts")
    parser.add_argument("out", type=Path, help="file to write, such as heads.safetensors")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the model that the heads will serve")
    parser.add_argument("--samples", type=Path, help="folder that keeps its texts; OUT.sampled if not given")
    parser.add_argument("--minutes", type=float, default=course.minutes, help="time to teach for, after the sampling")
    parser.add_argument("--prose", action="store_true", help="teach no text in the chat format")
    for name in ("inner", "window", "heads", "rounds", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(course, name))
    given = vars(parser.parse_args(argv))
    course = Course(**{name: given[name] for name in ("minutes", "inner", "window", "heads", "rounds", "threads")})
    if course.inner % HEADS:
        parser.error(f"--inner must be a multiple of {HEADS}, got {course.inner}")
    torch.set_num_threads(course.threads)
    torch.manual_seed(0)
    teacher = LlamaForCausalLM.from_pretrained(given["teacher"], dtype=torch.float32).eval().requires_grad_(False)
    corpus, tokenizer = Corpus(given["data"]), AutoTokenizer.from_pretrained(given["teacher"])
    samples = Sampled(given["samples"] or given["out"].with_suffix(".sampled"))
    samples.extend(teacher, Mixture(corpus, tokenizer), course.rounds)
    weights = fresh(int(teacher.config.hidden_size), course)
    print(f"{course} parameters {sum(w.numel() for w in weights.values())}", flush=True)
    tokens, hidden = samples.read(course.rounds)
    if given["prose"]:
        chat = ((tokens > 0) & (tokens < len(SPECIAL_TOKENS))).any(1)
        tokens, hidden = tokens[~chat], hidden[~chat]
    train(weights, teacher, (tokens, hidden), course, lambda text: print(text, flush=True))
    save({name: w.bfloat16() for name, w in weights.items()}, teacher, given["out"], KIND)
    prompts = Prompts(corpus, tokenizer)
    for kind in KINDS:
        found = judge(weights, teacher, prompts.rows(kind, PROMPTS), course.window, course.heads)
        print(f"{kind}: greedy {three(found['greedy'])}; sampled {three(found['sampled'])}")
    return 0
