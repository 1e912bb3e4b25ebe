"""accept=spectr beside the race: how many guesses of several paths stand when they are weighed by k-SEQ.

python -m bench.accept.spectr [--quick] [--threads 2] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from bench.guessing import DRAFT, SAMPLED, compared
from bench.harness import Case, Options, main

GUESSES = "draft=paths(paths=2, length=3)"
RACE = Case(name="race", prompts=[[0]], techniques=(GUESSES,))
CASES = {
    "k-SEQ": (GUESSES, "accept=spectr"),
    "rejection": (GUESSES, "accept=rejection"),
}
NOTES = (
    f"{DRAFT} For the race the paths are the first of its own race; for the others they are drawn alike, by noise of their own.",
    "Perfect draft: it knows the race's answer and costs nothing, so that every guess stands: no rule accepts more.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    yield from compared(options, "accept-spectr", CASES, laws=SAMPLED, null=RACE)


if __name__ == "__main__":
    sys.exit(main("accept=spectr", "bench.accept.spectr", measure, NOTES))
