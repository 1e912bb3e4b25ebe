"""accept=typical beside the race and beside rejection: how many more of a draft's guesses stand, and what that brings.

python -m bench.accept.typical [--quick] [--threads 2] [--json]
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
    "epsilon 0.3": (GUESSES, "accept=typical(epsilon=0.3)"),
    "epsilon 0.09": (GUESSES, "accept=typical(epsilon=0.09)"),
    "rejection": (GUESSES, "accept=rejection"),
}
NOTES = (
    f"{DRAFT} For the race and for typical acceptance it draws by the target's own noise, for rejection by noise of its own. The "
    "null keeps the seed's tokens, rejection keeps their law, typical acceptance keeps neither: what it does to answers is in "
    "docs/speculation.md.",
    "Perfect draft: it knows the race's answer and costs nothing, so that every guess stands: no rule accepts more.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    yield from compared(options, "accept-typical", CASES, laws=SAMPLED, null=RACE)


if __name__ == "__main__":
    sys.exit(main("accept=typical", "bench.accept.typical", measure, NOTES))
