"""draft=paths beside no draft: several paths of the shipped draft, raced and weighed, and one path alone.

python -m bench.draft.paths [--quick] [--threads 2] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from bench.guessing import DRAFT, bound, compared
from bench.harness import Options, main

CASES = {
    "2 paths of 3": ("draft=paths(paths=2, length=3)",),
    "2 paths of 3, k-SEQ": ("draft=paths(paths=2, length=3)", "accept=spectr"),
    "1 path of 3": ("draft=speculative_sampling(guesses=3)",),
    "1 path of 6": ("draft=speculative_sampling(guesses=6)",),
}
NOTES = (DRAFT, bound(3))


def measure(options: Options) -> Iterator[dict[str, Any]]:
    yield from compared(options, "paths", CASES, guesses=3)


if __name__ == "__main__":
    sys.exit(main("draft=paths", "bench.draft.paths", measure, NOTES))
