"""What the whole table of drafts is made of: which drafts under which loads, the most important first.

Every technique of the slot beside plain decoding and the bound, for one sequence; then those that the docs recommend, with the
controller, from 1 to 32 sequences; then the floor, on prompts of tokens by lot, where next to nothing can be guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from weft.registry import names

BEST = ("clover(guesses=4)", "speculative_sampling(guesses=4)")
"""Drafts that the docs recommend for ordinary text."""
MANY, CUT = 8, 96
"""With so many sequences at once no prompt is longer: 32 of 768 tokens take a minute to compute for each draft and round, and
decoding is what is measured."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Drafts under every load of texts, temperatures and batches.  new: tokens of an answer.  controller: on, off or both."""

    texts: tuple[str, ...]
    temperatures: tuple[float, ...]
    batches: tuple[int, ...]
    drafts: tuple[str, ...]
    controller: tuple[str, ...]
    new: int
    rounds: int


def sweeps() -> Iterator[Sweep]:
    """In the order in which they are measured."""
    real, few, many = ("prose", "spec-bench"), (2, 4), (8, 16, 32)
    yield Sweep(real, (0.8, 0.0), (1,), BEST, ("off", "on"), 64, 3)
    yield Sweep(("random",), (0.8,), (1, *few, *many), (*BEST, "ngram"), ("on",), 24, 3)
    yield Sweep(real, (0.8, 0.0), few, BEST, ("on",), 24, 3)
    yield Sweep(real, (0.8, 0.0), many, BEST, ("on",), 24, 2)
    others = [n for n in names("draft") if n != "none" and not any(n == b.partition("(")[0] for b in BEST)]
    yield Sweep(real, (0.8, 0.0), (1,), tuple(others), ("off",), 32, 2)


def loads(sweep: Sweep) -> Iterator[tuple[str, float, int]]:
    """(text, temperature, batch)."""
    yield from product(sweep.texts, sweep.temperatures, sweep.batches)


def longest(batch: int) -> int:
    """Tokens of a prompt, at most."""
    return CUT if batch >= MANY else 768
