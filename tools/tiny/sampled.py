"""Texts that a teacher writes itself, kept with its final hidden states: what a draft of it is taught with.

A draft is judged on its teacher's own output, so it has to be taught there (Zhou et al., "DistillSpec", arXiv:2310.08461).
The beginnings are windows of the mixture; the teacher goes on, each row at a temperature of its own.  Its law after each
token is the product of its hidden state there and its head, so the states alone give the whole law at an eighth of the
bytes, and a text is taught many times for one pass of the teacher.

Legend.  B: rows of a round.  N: tokens of a row.  P: tokens of a beginning.  D: width.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.tiny.mixture import Mixture

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROWS, TOKENS = 128, 256
BEGINNINGS = (8, 24, 64, 144)
"""Tokens of the mixture that a round begins with, in turn."""
TEMPERATURES = (1.0, 0.0, 1.0, 0.7)
"""Of the rows, in turn; 0.7 is what the bundled model is sampled with unless a request says otherwise."""
SEED = 1000
"""The first round's; apart from those that windows are drawn with in training and in judging."""


@torch.no_grad()
def write(
    teacher: LlamaForCausalLM, begin_BP: Tensor, n: int, temperature_B: Tensor, noise: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows of n tokens that begin as given: (tokens int64 [B, N], the teacher's final normed hidden states [B, N, D]).

    The winner of logits + temperature * Gumbel noise is a draw at that temperature, and the likeliest token at 0.
    """
    from transformers import StaticCache

    rows, done = begin_BP.size(0), 0
    cache = StaticCache(config=teacher.config, max_cache_len=n)
    tokens_BN = torch.empty(rows, n, dtype=torch.int64)
    hidden_BND = torch.empty(rows, n, teacher.config.hidden_size)
    tokens_BN[:, : begin_BP.size(1)] = fresh = begin_BP
    while done < n:
        stop = done + fresh.size(1)
        state = teacher.model(
            fresh, past_key_values=cache, use_cache=True, cache_position=torch.arange(done, stop)
        ).last_hidden_state
        hidden_BND[:, done:stop] = state
        if stop < n:
            logits = teacher.lm_head(state[:, -1])
            gumbel = -torch.empty_like(logits).exponential_(generator=noise).log()
            fresh = (logits + temperature_B[:, None] * gumbel).argmax(-1, keepdim=True)
            tokens_BN[:, stop] = fresh[:, 0]
        done = stop
    return tokens_BN, hidden_BND


def make_round(teacher: LlamaForCausalLM, mixture: Mixture, index: int) -> dict[str, Tensor]:
    """Round `index`, the same each time: tokens int32 [B, N] and hidden bfloat16 [B, N, D]."""
    mixture.reseed(SEED + index)
    begin = np.stack([mixture.draw(TOKENS) for _ in range(ROWS)])[:, : BEGINNINGS[index % len(BEGINNINGS)]]
    temperatures = torch.tensor(TEMPERATURES).repeat(ROWS // len(TEMPERATURES))
    noise = torch.Generator().manual_seed(SEED + index)
    tokens, hidden = write(teacher, torch.from_numpy(begin).long(), TOKENS, temperatures, noise)
    return {"tokens": tokens.int(), "hidden": hidden.bfloat16()}


class Sampled:
    """The rounds in a folder; those that are missing are made and stored as they come, so a stop loses one round."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def extend(self, teacher: LlamaForCausalLM, mixture: Mixture, rounds: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for index in range(rounds):
            path = self.folder / f"{index:03}.safetensors"
            if not path.exists():
                made = make_round(teacher, mixture, index)
                save_file(made, path.with_suffix(".part"))
                path.with_suffix(".part").rename(path)
                print(f"sampled round {index + 1} of {rounds}", flush=True)

    def read(self, rounds: int) -> tuple[Tensor, Tensor]:
        """All rows of the first rounds: tokens int32 [B, N], hidden bfloat16 [B, N, D]."""
        parts = [load_file(self.folder / f"{index:03}.safetensors") for index in range(rounds)]
        return torch.cat([part["tokens"] for part in parts]), torch.cat([part["hidden"] for part in parts])
