"""accept=bild beside the race and beside rejection: how many more of a draft's guesses stand, and what that brings.

python -m bench.accept.bild [--quick] [--threads 2] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from bench.guessing import DRAFT, compared
from bench.harness import Case, Options, main

GUESSES = "draft=speculative_sampling(guesses=4)"
RACE = Case(name="race", prompts=[[0]], techniques=(GUESSES,))
CASES = {
    "rollback 2": (GUESSES, "accept=bild(rollback=2)"),
    "rollback 4": (GUESSES, "accept=bild(rollback=4)"),
    "rejection": (GUESSES, "accept=rejection"),
}
NOTES = (
    f"{DRAFT} It makes as many guesses for every rule; its own half of the paper is measured as draft=bild. The null keeps the "
    "seed's tokens, rejection keeps their law, the rollback keeps neither: what it does to answers is in docs/speculation.md.",
    "Perfect draft: it knows the race's answer and costs nothing, so that every guess stands: no rule accepts more.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    yield from compared(options, "accept-bild", CASES, null=RACE)


if __name__ == "__main__":
    sys.exit(main("accept=bild", "bench.accept.bild", measure, NOTES))
