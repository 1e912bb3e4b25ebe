"""draft=vocabtrim beside no draft and beside the same draft with its whole head.

python -m bench.draft.vocabtrim [--quick] [--threads 2] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from bench.guessing import DRAFT, bound, compared
from bench.harness import Options, main
from bench.said import said

KEPT = (256, 1024, 2048)
NOTES = (
    f"{DRAFT} Of its 2.7 M weights the head's 4,096 rows are 1 M. The tokens kept are the commonest of 65,536 that the bundled "
    "model wrote at temperature 0.8, from other beginnings.",
    "The whole head: draft=speculative_sampling with the same draft and as many guesses.",
    bound(4),
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    text = said()
    cases = {f"{n} of 4,096": (f"draft=vocabtrim(text={text!r}, keep={n})",) for n in KEPT}
    yield from compared(options, "vocabtrim", {**cases, "the whole head": ("draft=speculative_sampling",)})


if __name__ == "__main__":
    sys.exit(main("draft=vocabtrim", "bench.draft.vocabtrim", measure, NOTES))
