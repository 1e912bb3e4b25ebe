"""draft=clover beside no draft and beside a draft model: the shipped heads guess for the bundled model, and for that model grown.

python -m bench.draft.clover [--quick] [--threads 2] [--json]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

from bench.draft.heads import fitted, heads_file
from bench.draft.law import Heads
from bench.guessing import DRAFT, Cases, bound, compared
from bench.harness import Model, Options, main
from weft.models import load_spec
from weft.models.layout import parameters

NOTES = (
    "The heads are those that ship with weft, of 131,168 parameters, taught for eight minutes on one thread with the bundled "
    "model's own texts; the grown model's are the same, widened.",
    DRAFT,
    bound(4),
)


def cases(model: Model) -> Cases:
    file = fitted(heads_file("bundled"), model)
    share = Heads(file).parameters / parameters(load_spec(model.folder))
    weights = repr(os.path.relpath(file))  # results tell nothing of this machine
    return {
        f"2 heads, {share:.2%} of the model": (f"draft=clover(guesses=2, weights={weights})",),
        f"4 heads, {share:.2%} of the model": (f"draft=clover(guesses=4, weights={weights})",),
        "draft model, 4 guesses": ("draft=speculative_sampling(guesses=4)",),
    }


def measure(options: Options) -> Iterator[dict[str, Any]]:
    yield from compared(options, "clover", cases)


if __name__ == "__main__":
    sys.exit(main("draft=clover", "bench.draft.clover", measure, NOTES))
