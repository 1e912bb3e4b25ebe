"""draft=dyspec beside no draft: trees of guesses from the shipped draft, and chains of as many passes and of as many rows.

python -m bench.draft.dyspec [--quick] [--threads 2] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from bench.guessing import DRAFT, bound, compared
from bench.harness import Options, main

CASES = {
    "tree of 4": ("draft=dyspec(guesses=4, depth=3)",),
    "tree of 7": ("draft=dyspec(guesses=7, depth=4)",),
    "tree of 7, rejection": ("draft=dyspec(guesses=7, depth=4)", "accept=rejection"),
    "chain of 4": ("draft=speculative_sampling(guesses=4)",),
}
NOTES = (DRAFT, bound(7))


def measure(options: Options) -> Iterator[dict[str, Any]]:
    yield from compared(options, "dyspec", CASES, guesses=7)


if __name__ == "__main__":
    sys.exit(main("draft=dyspec", "bench.draft.dyspec", measure, NOTES))
