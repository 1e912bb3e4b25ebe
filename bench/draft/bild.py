"""draft=bild beside no draft: a draft that stops where it is not sure, under the race and under the paper's own rollback.

python -m bench.draft.bild [--quick] [--threads 2] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from bench.guessing import DRAFT, bound, compared
from bench.harness import Options, main

CASES = {
    "fallback 0.1": ("draft=bild(fallback=0.1)",),
    "fallback 0.3": ("draft=bild(fallback=0.3)",),
    "fallback 0.1, rollback 2": ("draft=bild(fallback=0.1)", "accept=bild(rollback=2)"),
    "4 guesses": ("draft=speculative_sampling(guesses=4)",),
}
NOTES = (
    f"{DRAFT} It is seldom sure. Fallback 0.1 and 0.3 are exact; with the rollback answers are others (docs/speculation.md). The "
    "last is the same model with as many guesses in every step.",
    bound(8),
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    yield from compared(options, "bild", CASES, guesses=8)


if __name__ == "__main__":
    sys.exit(main("draft=bild", "bench.draft.bild", measure, NOTES))
