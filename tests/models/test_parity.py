"""Every family gives the reference implementation's logits, however its rows are batched, chunked or cached."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.models.checkpoints import VARIANTS, Checkpoint
from tests.models.harness import Bench, Rows, bench_for
from weft.models import load_spec

pytestmark = pytest.mark.usefixtures("ops")
LENGTH = 100
"""Tokens of a prompt: past twice the window (24) and three times the rope scalings' original length (32)."""
TOLERANCE = 1e-4


def prompt(seed: int, length: int = LENGTH) -> list[int]:
    return torch.randint(0, 211, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_batches(bench: Bench, reference: Checkpoint) -> None:
    """Mixed batches of three sequences in uneven chunks, one of which then continues a cached prefix."""
    prompts = {name: prompt(seed, length) for seed, (name, length) in enumerate([("a", LENGTH), ("b", 37), ("c", 70)])}
    wanted = {name: reference.logits(tokens) for name, tokens in prompts.items()}
    plan = [("a", 0, 33), ("b", 0, 36), ("a", 33, 50), ("c", 0, 69), ("b", 36, 37), ("a", 50, LENGTH), ("c", 69, 70)]
    for first, last in ((0, 2), (2, 4), (4, 7)):
        part = plan[first:last]
        found = bench.run([Rows(name, prompts[name][lo:hi], lo) for name, lo, hi in part])
        for (name, lo, hi), logits in zip(part, found, strict=True):
            assert (logits - wanted[name][lo:hi]).abs().max() < TOLERANCE, (name, lo, hi)
    bench.share("c", "d", 32)
    logits = bench.run([Rows("d", prompts["c"][32:], 32)])[0]
    assert (logits - wanted["c"][32:]).abs().max() < TOLERANCE, "cached prefix"


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_greedy_tokens(name: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    reference = checkpoint(name)
    spec = load_spec(reference.folder)
    fast = bench_for(spec, reference.folder, invariant=False, slide=False)
    check_batches(fast, reference)
    exact = bench_for(spec, reference.folder)
    assert exact.decoder.invariant
    tokens = prompt(11, 60)
    output = exact.greedy("g", tokens, 64)
    every = reference.logits(tokens + output)
    best = every[len(tokens) - 1 : -1].argmax(-1).tolist()
    assert output == best
    again = exact.chunked("h", tokens + output, 17)
    assert as_near(again, every, reference, tokens + output)


def as_near(found: torch.Tensor, theirs: torch.Tensor, reference: Checkpoint, tokens: list[int]) -> bool:
    """Within the tolerance of transformers, or as near to float64 arithmetic as transformers' own float32 is.

    Where attention is so peaked that rounding alone takes two right implementations farther apart than the tolerance (yarn's
    factor does that), float64 is the judge.
    """
    if (found - theirs).abs().max() < TOLERANCE:
        return True
    exact = replace(reference, model=copy.deepcopy(reference.model).double()).logits(tokens).double()
    ours, other = (found - exact).abs(), (theirs - exact).abs()
    return bool(ours.max() < 2 * other.max() and ours.square().mean() < 1.5**2 * other.square().mean())


def test_attention_is_far_from_uniform(checkpoint: Callable[[str], Checkpoint]) -> None:
    """The models' weights make attention peaked, so that a wrong mask, scale or rope can't hide."""
    for name in ("llama", "gemma2", "qwen3"):
        model = checkpoint(name).model
        with torch.no_grad():
            found = model(torch.tensor([prompt(1)]), output_attentions=True)
        top = torch.stack([layer[0, :, 50:].amax(-1).mean() for layer in found.attentions])
        assert (top > 0.15).all(), (name, top)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_bfloat16_is_as_near_as_the_reference_in_bfloat16(name: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    reference = checkpoint(name)
    bench = bench_for(load_spec(reference.folder), reference.folder, dtype="bfloat16")
    assert not bench.decoder.invariant
    tokens = prompt(3)
    wanted = reference.logits(tokens)
    narrow = Checkpoint(name, reference.folder, copy.deepcopy(reference.model).bfloat16())

    def distance(logits: torch.Tensor) -> float:
        return float((logits - wanted).square().mean().sqrt())

    assert distance(bench.chunked("a", tokens, 40)) < 1.3 * distance(narrow.logits(tokens))
