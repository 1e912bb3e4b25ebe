"""draft=early_exit beside no draft, with the exit that it chooses and with exits that stay.

python -m bench.draft.early_exit [--quick] [--threads 2] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from bench.guessing import Cases, bound, compared
from bench.harness import Model, Options, main
from weft.models import load_spec

QUARTERS = (1, 3)
NOTES = (
    "The bundled model has 8 layers and the grown one 24, of which every third is one of these. It was not trained to leave "
    "early.",
    bound(2),
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    yield from compared(options, "early_exit", exits, guesses=2)


def exits(model: Model) -> Cases:
    """Exits after so many quarters of a model's layers, beside the one that is chosen."""
    layers = len(load_spec(model.folder).layers)
    after = {
        f"{q} of 4 quarters, 2 guesses": (f"draft=early_exit(exit={layers * q // 4}, guesses=2)",) for q in QUARTERS
    }
    return {"chosen in every step": ("draft=early_exit",), **after}


if __name__ == "__main__":
    sys.exit(main("draft=early_exit", "bench.draft.early_exit", measure, NOTES))
