"""What the whole table of drafts is made of: which drafts under which loads, the most important first.

The floor first, with 8, 16 and 32 sequences, where next to nothing is to be gained and a wrong choice loses most; then what the
docs recommend for one sequence and for a few; then every other technique of the slot for one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

from bench import contender
from weft.conform.code import code
from weft.core import control, lengths, prices
from weft.registry import names

BEST = ("clover(guesses=4)", "speculative_sampling(guesses=4)")
"""Drafts that the docs recommend for ordinary text."""
TREE = "dyspec(guesses=7)"
"""As many rows as cost little more than one."""
MANY, CUT = 8, 96
"""With so many sequences at once no prompt is longer: 32 of 768 tokens take a minute to compute for each draft and round, and
decoding is what is measured."""


KINDS = ("translation", "summarization", "qa", "math_reasoning", "rag")
"""Of Spec-Bench's categories; all others are MT-Bench's."""


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
    for batch in many:
        yield Sweep((*real, "random"), (0.8, 0.0), (batch,), (*BEST, "ngram"), ("on",), 48, 5)
    yield Sweep(real, (0.8, 0.0), (1,), (*BEST, TREE), ("on",), 64, 3)
    yield Sweep(real, (0.8, 0.0), few, BEST, ("on",), 24, 3)
    yield Sweep(("random",), (0.8, 0.0), (1, *few), (*BEST, "ngram"), ("on",), 24, 3)
    yield Sweep(real, (0.8, 0.0), (1,), BEST, ("off",), 64, 3)
    others = [n for n in names("draft") if n != "none" and not any(n == b.partition("(")[0] for b in BEST)]
    yield Sweep(real, (0.8, 0.0), (1,), tuple(others), ("off",), 32, 2)


def loads(sweep: Sweep) -> Iterator[tuple[str, float, int]]:
    """(text, temperature, batch)."""
    yield from product(sweep.texts, sweep.temperatures, sweep.batches)


def longest(batch: int) -> int:
    """Tokens of a prompt, at most."""
    return CUT if batch >= MANY else 768


def in_turns(questions: Sequence[dict[str, Any]], rnd: random.Random) -> list[str]:
    """The first turns of Spec-Bench's questions: one of each kind (MT-Bench's are one kind), then the next of each."""
    kinds: dict[str, list[str]] = {}
    for question in questions:
        kind = question["category"]
        kinds.setdefault(kind if kind in KINDS else "mt_bench", []).append(question["turns"][0])
    for asks in kinds.values():
        rnd.shuffle(asks)
    return [ask for several in zip_longest(*kinds.values()) for ask in several if ask is not None]


@cache
def decided_by() -> str:
    """Which controller this is, and which way of measuring it."""
    return hashlib.sha256(
        b"".join(code(Path(f.__file__).read_text()) for f in (control, lengths, prices, contender) if f.__file__)
    ).hexdigest()[:12]
