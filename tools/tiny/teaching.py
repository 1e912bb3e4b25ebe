"""What every kind of teaching needs: a log, a step of the optimizers, a teacher's answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from weft import SamplingParams

Say = Callable[[str], None]
Pairs = Sequence[tuple[torch.optim.Optimizer, float]]
"""Optimizers, each with its full learning rate."""
ASKED_AT_ONCE = 200
BATCH = 32


@contextlib.contextmanager
def logged(path: Path) -> Iterator[Say]:
    """Says a line to the terminal and at the end of a file."""
    with path.open("a", encoding="utf8") as log:

        def say(text: str) -> None:
            print(text, flush=True)
            print(text, file=log, flush=True)

        yield say


def set_rates(pairs: Pairs, factor: float) -> None:
    for optimizer, base in pairs:
        for group in optimizer.param_groups:
            group["lr"] = base * factor


def descend(model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer], loss: Tensor) -> None:
    """One step down; the gradient is at most 1 long."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)


def answers(
    teacher: Path, asks: Sequence[Sequence[int]], laws: Sequence[SamplingParams], longest: int, threads: int, say: Say
) -> list[list[int]]:
    """What the model says to each under its law, the end included.  longest: tokens of a request and its answer."""
    from weft import LLM

    found = list[list[int]]()
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "threads": threads}
    with LLM(teacher, max_model_len=longest, max_num_seqs=BATCH, **options) as llm:
        for low in range(0, len(asks), ASKED_AT_ONCE):
            here = slice(low, low + ASKED_AT_ONCE)
            outs = llm.generate([{"prompt_token_ids": list(ask)} for ask in asks[here]], laws[here], use_tqdm=False)
            found += [list(out.outputs[0].token_ids) for out in outs]
            say(f"answers {len(found)} of {len(asks)}")
    return found
