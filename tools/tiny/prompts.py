"""Prompt tokens for a model (`draft=prompt_tokens`): inputs of its first layer, taught with its own texts, the model frozen.

    python -m tools.train_tiny prompts DATA OUT --teacher MODEL

The texts are those that a draft is taught with (`sampled.py`), held-out novels in none of them.  Behind some places t of a text
stand the learned tokens s_1 .. s_n, at positions t + 1 .. t + n; the model's law at s_j is to be its law after token t + j,
which s_j does not see.  Minimized is the divergence from that law, and in the last part in part the distance of total variation,
the chance that a guess falls.  A number of steps ends it and every draw has its seed, so that a run can be repeated.
OUT is a safetensors file, in float32.

Legend.  B: texts of a step.  N: tokens of a text.  P: places in each.  K: learned tokens.  W: width.  V: vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tools.tiny.accept import Prompts
from tools.tiny.corpus import Corpus
from tools.tiny.heads import KINDS, NEW_TOKENS, PROMPTS, loss_of, product, save, three
from tools.tiny.mixture import Mixture
from tools.tiny.sampled import Sampled, write
from weft.draft.prompt_tokens import KIND

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

WARM_UP_STEPS = 20
LOG_STEPS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """tokens: that are taught.  texts, places: of a step, and in each of its texts.  rate: of Adam, of the size of embeddings.
    variation: the weight of total variation in the last part."""

    tokens: int = 4
    steps: int = 400
    texts: int = 2
    places: int = 16
    rounds: int = 4
    rate: float = 0.3
    flat: float = 0.4
    variation_from: float = 0.6
    variation: float = 0.5
    threads: int = 1

    def learning(self, step: int) -> float:
        """Factor on the learning rate: warm-up, flat, then linear decay."""
        done = step / self.steps
        warm = min(1.0, (step + 1) / WARM_UP_STEPS)
        return warm * (1.0 if done < self.flat else max(0.02, (1 - done) / (1 - self.flat)))


def fresh(embeddings_VW: Tensor, count: int) -> Tensor:
    """Tokens to begin with: the mean embedding, and noise as large as embeddings differ."""
    noise = torch.randn(count, embeddings_VW.size(1), generator=torch.Generator().manual_seed(0))
    return embeddings_VW.mean(0) + embeddings_VW.std(0) * noise


def outputs(soft_KW: Tensor, teacher: LlamaForCausalLM, tokens_BN: Tensor, at_BP: Tensor) -> Tensor:
    """Final normed states of the learned tokens behind each place, [B, P, K, W]; what stands before them has no gradient."""
    (b, p), k, n = at_BP.shape, len(soft_KW), tokens_BN.size(1)
    with torch.no_grad():
        cache = teacher.model(tokens_BN, use_cache=True).past_key_values
    positions = (at_BP[:, :, None] + torch.arange(1, k + 1)).flatten(1)
    context = torch.arange(n) <= at_BP[:, :, None, None].expand(b, p, k, 1).flatten(1, 2)
    own = torch.block_diag(*[torch.ones(k, k).tril()] * p).bool().expand(b, -1, -1)
    seen = torch.cat([context, own], -1)
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    found = teacher.model(
        inputs_embeds=soft_KW.repeat(p, 1).expand(b, -1, -1), attention_mask=mask[:, None], position_ids=positions,
        past_key_values=cache, use_cache=True,
    ).last_hidden_state  # fmt: skip
    return found.view(b, p, k, -1)


def train(
    soft_KW: Tensor, teacher: LlamaForCausalLM, texts: tuple[Tensor, Tensor], course: Course, say: Callable[[str], None]
) -> Tensor:
    """The tokens after the course."""
    tokens, hidden = texts
    size = float(teacher.model.embed_tokens.weight.std())
    soft = soft_KW.clone().requires_grad_()
    optimizer = torch.optim.Adam([soft], course.rate * size, betas=(0.9, 0.98))
    noise, total = torch.Generator().manual_seed(0), torch.zeros(len(soft))
    for step in range(course.steps):
        for group in optimizer.param_groups:
            group["lr"] = course.rate * size * course.learning(step)
        row = torch.randint(len(tokens), (course.texts, 1), generator=noise)
        at = torch.randint(tokens.size(1) - len(soft), (course.texts, course.places), generator=noise)
        ahead = at[:, :, None] + torch.arange(1, len(soft) + 1)
        with torch.no_grad():
            p = product(teacher, hidden[row[:, :, None], ahead].float().flatten(0, 2)).softmax(-1)
        logits = product(teacher, outputs(soft, teacher, tokens[row[:, 0]].long(), at).flatten(0, 2))
        loss = loss_of(p, logits, course.variation if step >= course.variation_from * course.steps else 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += torch.minimum(p, logits.detach().softmax(-1)).sum(-1).view(-1, len(soft)).mean(0)
        if (step + 1) % LOG_STEPS == 0:
            say(f"step {step + 1} loss {loss.item():.3f} overlap {three(total / LOG_STEPS)}")
            total.zero_()
    return soft.detach()


@torch.no_grad()
def judge(soft_KW: Tensor, teacher: LlamaForCausalLM, prompt_BP: Tensor) -> dict[str, list[float]]:
    """By "greedy" and "sampled" (temperature 1), how often a guess at each distance stands, over all places of its own texts."""
    found, k = {}, len(soft_KW)
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        rows, start = prompt_BP.shape
        n = start + NEW_TOKENS
        tokens, hidden = write(
            teacher, prompt_BP, n, torch.full((rows,), temperature), torch.Generator().manual_seed(5)
        )
        at, total = torch.arange(start - 1, n - k), torch.zeros(k)
        for text, states in zip(tokens, hidden, strict=True):
            q = teacher.lm_head(outputs(soft_KW, teacher, text[None], at[None])[0])
            p = teacher.lm_head(states[at[:, None] + torch.arange(1, k + 1)])
            if temperature:
                total += torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1).mean(0)
            else:
                total += (p.argmax(-1) == q.argmax(-1)).float().mean(0)
        found[name] = (total / rows).tolist()
    return found


def main(argv: Sequence[str]) -> int:
    from transformers import AutoTokenizer, LlamaForCausalLM

    course = Course()
    parser = argparse.ArgumentParser(prog="train_tiny prompts", description="Teach prompt tokens for a model.")
    parser.add_argument("data", type=Path, help="folder of texts")
    parser.add_argument("out", type=Path, help="file to write, such as tokens.safetensors")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the model that the tokens will serve")
    parser.add_argument("--samples", type=Path, help="folder that keeps its texts; OUT.sampled if not given")
    for name in ("tokens", "steps", "texts", "places", "rounds", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(course, name))
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="prompts of each kind to judge by")
    parser.add_argument("--rate", type=float, default=course.rate, help="learning rate, of the size of embeddings")
    given = vars(parser.parse_args(argv))
    names = ("tokens", "steps", "texts", "places", "rounds", "threads", "rate")
    course = Course(**{name: given[name] for name in names})
    torch.set_num_threads(course.threads)
    teacher = LlamaForCausalLM.from_pretrained(given["teacher"], dtype=torch.float32).eval().requires_grad_(False)
    corpus, tokenizer = Corpus(given["data"]), AutoTokenizer.from_pretrained(given["teacher"])
    samples = Sampled(given["samples"] or given["out"].with_suffix(".sampled"))
    samples.extend(teacher, Mixture(corpus, tokenizer), course.rounds)
    soft = fresh(teacher.model.embed_tokens.weight, course.tokens)
    print(f"{course} parameters {soft.numel()}", flush=True)
    soft = train(soft, teacher, samples.read(course.rounds), course, lambda text: print(text, flush=True))
    save({"soft": soft}, teacher, given["out"], KIND)
    prompts = Prompts(corpus, tokenizer)
    for kind in KINDS:
        found = judge(soft, teacher, prompts.rows(kind, given["prompts"]))
        print(f"{kind}: greedy {three(found['greedy'])}; sampled {three(found['sampled'])}")
    return 0
