"""Train the bundled model on a CPU: its tokenizer, then a small Llama.

    python -m tools.train_tiny tokenizer DATA OUT
    python -m tools.train_tiny model     DATA OUT --minutes 90
    python -m tools.train_tiny evaluate  DATA OUT
    python -m tools.train_tiny draft     DATA OUT --teacher MODEL --minutes 33     a draft of MODEL, see `tools/tiny/distil.py`
    python -m tools.train_tiny fastdraft DATA OUT --teacher MODEL                  a draft in steps, see `tools/tiny/fastdraft.py`
    python -m tools.train_tiny asked     DATA OUT --teacher MODEL --init DRAFT     a draft goes on, see `tools/tiny/asked.py`
    python -m tools.train_tiny heads     DATA OUT --teacher MODEL --minutes 8      heads of MODEL, see `tools/tiny/heads.py`
    python -m tools.train_tiny prompts   DATA OUT --teacher MODEL                  tokens of MODEL, see `tools/tiny/prompts.py`
    python -m tools.train_tiny accept    DATA OUT --teacher MODEL                  what it is worth, see `tools/tiny/accept.py`

DATA is laid out as `tools/tiny/corpus.py` says.  The model in the package came from two runs on two cores, one of about 18
minutes and, with `--init` at its checkpoint, one of 84.  Windows grow with time (a quarter, half, then the whole of
`--seq`), since attention over long windows is the costly part on a CPU; matrices learn by Muon, the rest by AdamW.
Needs the extra `hf`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tools.tiny.corpus import ASSISTANT, END, END_OF_TEXT, Corpus, train_tokenizer
from tools.tiny.mixture import Mixture
from tools.tiny.muon import Muon
from tools.tiny.teaching import Say, logged, set_rates

if TYPE_CHECKING:
    from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MATRIX_LR, OTHER_LR = 0.02, 3e-3
WARM_UP_STEPS = 50
HEAD_DIM = 64
EVALUATION_WINDOWS = 8
EVALUATION_TOKENS = 1024
RECALL_WINDOWS = 16
RECALL_SEED = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Sizes of the model and of the run.  seq, batch: tokens and windows of a step once windows are whole."""

    minutes: float = 90.0
    layers: int = 8
    width: int = 256
    seq: int = 1024
    batch: int = 8
    threads: int = 2
    compile: bool = True
    init: str | None = None

    def learning(self, done: float, step: int) -> float:
        """Factor on both learning rates when a share `done` of the time has passed: warm-up, flat, then linear decay."""
        warm = min(1.0, (step + 1) / WARM_UP_STEPS)
        return warm * (1.0 if done < 0.5 else max(0.02, (1 - done) / 0.5))

    def window(self, done: float) -> int:
        return self.seq if done > 0.85 else self.seq // 2 if done > 0.55 else self.seq // 4


@dataclass(frozen=True, slots=True)
class Score:
    """loss in nats per token of the held-out novels; recall is the share of numbers given back without a fault."""

    loss: float
    recall: float

    def __str__(self) -> str:
        return f"held-out loss {self.loss:.3f} perplexity {math.exp(self.loss):.1f} recall {self.recall:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (
        ["draft"],
        ["fastdraft"],
        ["asked"],
        ["heads"],
        ["prompts"],
        ["accept"],
    ):  # they have options of their own
        from tools.tiny import accept, asked, distil, fastdraft, heads, prompts

        own: dict[str, Any] = {
            "draft": distil, "fastdraft": fastdraft, "asked": asked, "heads": heads, "prompts": prompts, "accept": accept
        }  # fmt: skip
        return int(own[words[0]].main(words[1:]))
    defaults = Recipe()
    parser = argparse.ArgumentParser(
        description="Train the bundled model.",
        epilog="draft, fastdraft, asked, heads, prompts and accept: see --help behind them.",
    )
    parser.add_argument("what", choices=("tokenizer", "model", "evaluate"))
    parser.add_argument("data", type=Path, help="folder of texts")
    parser.add_argument(
        "out", type=Path, help="folder of the checkpoint; `model` and `evaluate` read the tokenizer from it"
    )
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="time to train for")
    parser.add_argument("--layers", type=int, default=defaults.layers)
    parser.add_argument("--width", type=int, default=defaults.width, help="a multiple of 64")
    parser.add_argument("--seq", type=int, default=defaults.seq, help="longest window, tokens")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="windows of full length in a step")
    parser.add_argument("--threads", type=int, default=defaults.threads)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do without torch.compile")
    parser.add_argument("--init", help="checkpoint folder to start from")
    options = vars(parser.parse_args(words))
    what, data, out = options.pop("what"), options.pop("data"), options.pop("out")
    recipe = Recipe(**options)
    out.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(data)
    torch.set_num_threads(recipe.threads)
    if what == "tokenizer":
        tokenizer = train_tokenizer(corpus)
        tokenizer.save_pretrained(out)
        print(f"vocabulary {len(tokenizer)}")
    elif what == "model":
        with logged(out / "train.log") as say:
            train(corpus, out, recipe, say)
    else:
        from transformers import LlamaForCausalLM

        tokenizer = load_tokenizer(out)
        model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
        print(evaluate(model, corpus, Mixture(corpus, tokenizer), recipe.seq))
    return 0


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def build(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """A Llama with heads of 64, half as many KV heads, tied embeddings; from `--init` where that is given."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if recipe.init:
        return LlamaForCausalLM.from_pretrained(recipe.init, dtype=torch.float32)
    heads = recipe.width // HEAD_DIM
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=HEAD_DIM,
        intermediate_size=recipe.width * 3,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(corpus: Corpus, out: Path, recipe: Recipe, say: Say) -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(out)
    model = build(tokenizer, recipe)
    mixture = Mixture(corpus, tokenizer)

    say(f"parameters {sum(p.numel() for p in model.parameters())}; tokens {mixture.sizes()}")
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in name)]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (Muon(matrices, MATRIX_LR), MATRIX_LR),
        (torch.optim.AdamW(others, OTHER_LR, betas=(0.9, 0.95), weight_decay=0), OTHER_LR),
    ]
    forward: Any = torch.compile(model, dynamic=False) if recipe.compile else model
    model.train()
    started, step, seen, average = time.monotonic(), 0, 0, math.nan
    while (elapsed := time.monotonic() - started) < recipe.minutes * 60:
        done = elapsed / (recipe.minutes * 60)
        set_rates(optimizers, recipe.learning(done, step))
        batch = draw(mixture, recipe, recipe.window(done))
        loss = learn(forward, model, optimizers, batch)
        step, seen = step + 1, seen + batch.numel()
        average = loss if math.isnan(average) else 0.95 * average + 0.05 * loss
        if step % 25 == 0:
            speed = seen / (time.monotonic() - started)
            say(f"step {step} tokens {seen} loss {average:.3f} tokens/s {speed:.0f} minute {elapsed / 60:.1f}")
        if step % 400 == 0:
            say(str(evaluate(model, corpus, mixture, recipe.seq)))
            model.save_pretrained(out / "checkpoint")
    say(f"final {evaluate(model, corpus, mixture, recipe.seq)} tokens {seen}")
    model.to(torch.bfloat16).save_pretrained(out)
    generation_config(tokenizer).save_pretrained(out)


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """How the model is sampled by default; a turn's end and a text's end both end an answer."""
    from transformers import GenerationConfig

    ends = [int(tokenizer.convert_tokens_to_ids(token)) for token in (END, END_OF_TEXT)]
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
    )


def draw(mixture: Mixture, recipe: Recipe, n: int) -> Tensor:
    """A step's windows, int64 [B, N]; the tokens of a step are the same whatever n is."""
    rows = max(1, recipe.batch * recipe.seq // n)
    return torch.from_numpy(np.stack([mixture.draw(n) for _ in range(rows)])).long()


def learn(
    forward: Any, model: LlamaForCausalLM, optimizers: Sequence[tuple[torch.optim.Optimizer, float]], batch: Tensor
) -> float:
    """One step of both optimizers; the loss before it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = forward(batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, _ in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return float(loss.item())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, corpus: Corpus, mixture: Mixture, seq: int) -> Score:
    """Loss over the first windows of the held-out novels, and exact recall over made-up windows of `seq` tokens.

    The recall windows are the same each time; the mixture's own randomness is put back afterwards.
    """
    model.eval()
    total, count = 0.0, 0
    for text in corpus.held_out():
        ids = torch.from_numpy(mixture.encode(text)).long()
        for start in range(0, EVALUATION_WINDOWS * EVALUATION_TOKENS, EVALUATION_TOKENS):
            window = ids[start : start + EVALUATION_TOKENS][None]
            total += float(model(window, labels=window).loss) * (window.size(1) - 1)
            count += window.size(1) - 1
    kept = mixture.choice, mixture.place
    mixture.reseed(RECALL_SEED)
    windows = [torch.from_numpy(mixture.recall(seq)).long() for _ in range(RECALL_WINDOWS)]
    mixture.choice, mixture.place = kept
    hits = [hit for window in windows for hit in recalled(model, mixture, window)]
    model.train()
    return Score(total / count, sum(hits) / max(1, len(hits)))


def recalled(model: LlamaForCausalLM, mixture: Mixture, window: Tensor) -> list[bool]:
    """For each answer in a window [N]: whether the likeliest token was right at every place of it, its end included."""
    ask, end = (int(mixture.tokenizer.convert_tokens_to_ids(t)) for t in (ASSISTANT, END))
    likeliest = model(window[None]).logits[0].argmax(-1)
    hits = []
    for start in (window == ask).nonzero()[:, 0].tolist():
        stop = start + 1
        while stop < len(window) and window[stop] != end:
            stop += 1
        if stop < len(window):  # an answer that the window cuts off proves nothing
            hits.append(bool((likeliest[start:stop] == window[start + 1 : stop + 1]).all()))
    return hits


if __name__ == "__main__":
    sys.exit(main())
