"""What a draft takes of the memory: its model, and what it holds beside that."""

from __future__ import annotations

from dataclasses import replace

from weft.config import Stack
from weft.models.layout import weights_bytes, workspace_bytes
from weft.models.spec import DecoderSpec, dtype_bytes
from weft.ops.choice import Choice

MAX_GUESSES = 16
"""Guesses that are verified for one sequence in a step."""


def own_bytes(stack: Stack, sequences: int, target: DecoderSpec) -> int:
    """Bytes that a draft holds beside the models, and laws of guesses that the target's first layers make."""
    draft = stack["draft"]
    memory = getattr(draft, "memory", None)
    guesses = min(MAX_GUESSES, int(draft.guesses)) if hasattr(draft, "exits") else 0
    laws = sequences * guesses * target.vocab * dtype_bytes("float32")
    return laws + (0 if memory is None else int(memory(sequences, target.vocab)))


def model_bytes(
    draft: DecoderSpec, choice: Choice, dtype: str, rows: int, sequences: int, stack: Stack, target: DecoderSpec
) -> int:
    """Weights and workspace of a draft model, and laws of its guesses for an `accept` that weighs them."""
    foreign = target.vocab if getattr(stack["draft"], "translates", False) else 0
    guesses = min(MAX_GUESSES, stack["draft"].guesses)
    if hasattr(stack["draft"], "early"):
        guesses = 2 * guesses + 1  # those that are verified, and what is written behind them meanwhile
    laws = sequences * guesses * (foreign or draft.vocab) * dtype_bytes("float32")
    laws += max(sequences, MAX_GUESSES) * foreign * dtype_bytes("float32")  # its logits, in the target's ids
    keep = min(getattr(stack["draft"], "keep", 0), draft.vocab)
    cut = replace(draft, tied=False, kept=tuple(range(keep))) if 0 < keep < draft.vocab else draft
    body = replace(draft, tied=True)  # a shorter head stands beside the whole one
    more = 0 if cut is draft else weights_bytes(cut, dtype, choice.panels) - weights_bytes(body, dtype, choice.panels)
    # Its logits become rows of the whole vocabulary, as many as they were.  A layer of a tree has one for each guess.
    workspace = workspace_bytes(draft, stream(choice, dtype), rows, max(sequences, MAX_GUESSES), choice.panels)
    return weights_bytes(draft, dtype, choice.panels) + more + workspace + laws


def thread_shares(stack: Stack, count: int) -> tuple[int, int]:
    """Of the target's kernels and of the draft model's, out of --threads: a draft that guesses beside the target has one.  The
    target keeps all, for the time in which nobody guesses: with one of two it took a third longer, beside a cheap draft too."""
    return (count, 1) if hasattr(stack["draft"], "early") else (count, count)


def stream(choice: Choice, dtype: str) -> str:
    """Number format of activations."""
    return "float32" if choice.panels else dtype
