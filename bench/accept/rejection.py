"""accept=rejection beside the race: how many of a draft's guesses stand when they are weighed instead of raced.

python -m bench.accept.rejection [--quick] [--threads 2] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from bench.guessing import DRAFT, SAMPLED, compared
from bench.harness import Case, Options, main

GUESSES = "draft=speculative_sampling(guesses=4)"
RACE = Case(name="race", prompts=[[0]], techniques=(GUESSES,))
CASES = {
    "rejection": (GUESSES, "accept=rejection"),
}
NOTES = (
    f"{DRAFT} Its noise counts: for the race it draws by the target's own, so that the two agree about as often as their laws "
    "overlap; for rejection by noise of its own. The null keeps the seed's tokens, rejection keeps their law alone.",
    "Perfect draft: it knows the race's answer and costs nothing, so that every guess stands: no rule accepts more.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    yield from compared(options, "accept-rejection", CASES, laws=SAMPLED, null=RACE)


if __name__ == "__main__":
    sys.exit(main("accept=rejection", "bench.accept.rejection", measure, NOTES))
