"""draft=speculative_sampling beside no draft: the shipped draft guesses for the bundled model, and for that model grown large.

python -m bench.draft.speculative_sampling [--quick] [--threads 2] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from bench.guessing import DRAFT, bound, compared
from bench.harness import Options, main

CASES = {
    "2 guesses": ("draft=speculative_sampling(guesses=2)",),
    "4 guesses": ("draft=speculative_sampling(guesses=4)",),
    "4 guesses, rejection": ("draft=speculative_sampling(guesses=4)", "accept=rejection"),
    "BASS's length": ("draft=speculative_sampling(guesses=4, adapt=True)",),
}
NOTES = (
    f"{DRAFT} It was taught to agree with the bundled model; the grown one computes what the bundled one does at the cost of its "
    "shape, so that guesses are as good.",
    f"{bound(4)} What is missing to 5 times is the price of a step of five rows instead of one.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    yield from compared(options, "speculative_sampling", CASES)


if __name__ == "__main__":
    sys.exit(main("draft=speculative_sampling", "bench.draft.speculative_sampling", measure, NOTES))
