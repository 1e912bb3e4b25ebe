"""skip=mue beside all layers: how many rows leave, and what that brings when decoding alone and in a batch.

python -m bench.skip.mue [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.harness import Case, Options, encode, main
from bench.texts import OPENINGS, PARAGRAPHS
from weft.models import load_spec

BATCHES = (1, 8)
NOTES = (
    "No model here was trained to be left early, so answers drift (same tokens); the figures say what leaving saves, not what it "
    "is worth. A trained one leaves earlier and oftener at the same loss.",
    "Half: an exit at half of the layers that every generated row takes (threshold 0.5), the most that can be saved there. Late: "
    "the exit before the last layer, at the threshold of the technique's stated bound.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m"):
        layers = len(load_spec(model.folder).layers)
        prompts = encode(model, [*OPENINGS, *PARAGRAPHS])
        for batch in BATCHES[:1] if options.quick else BATCHES:
            null = Case(
                name="all layers", prompts=prompts[: max(batch, 2)], max_new=16 if options.quick else 48, batch=batch
            )
            half = replace(
                null, name="half", techniques=(f"skip=mue(after=({layers // 2},), threshold=0.5)",), bound=True
            )
            late = replace(null, name="late", techniques=(f"skip=mue(after=({layers - 1},), threshold=0.965)",))
            never = replace(
                null, name="asked, nobody leaves", techniques=(f"skip=mue(after=({layers // 2},), threshold=1.0)",)
            )
            yield options.compare(model, null, [half, late, never], "prose")


if __name__ == "__main__":
    sys.exit(main("skip=mue", "bench.skip.mue", measure, NOTES))
