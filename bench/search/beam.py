"""search=beam beside as many greedy requests as there are beams: what the search costs, and the KV that beams share.

python -m bench.search.beam [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.harness import Case, Options, encode, main
from bench.texts import PARAGRAPHS

WIDTHS = (2, 8)
LENGTH = 256
"""Tokens of the prompt."""
NOTES = (
    "Bound of memory: with W beams, a prompt of P tokens and N new ones, at least P + N of W (P + N) entries are held, 1 / W, "
    "where all beams have their answer in common; of time, W times fewer rows of the prompt.",
    "The null is as many greedy requests with the same prompt as there are beams, each of which computes it. Tokens a second "
    "count every token that a row was computed for, over the whole time, prompts included.",
    "Equal tokens are not expected: greedy decoding is the null, and beam search is for finding something likelier.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m"):
        for width in WIDTHS[:1] if options.quick else WIDTHS:
            ids = [tuple(x * 9)[: 64 if options.quick else LENGTH] for x in encode(model, PARAGRAPHS[:1])]
            null = Case(
                name=f"{width} requests",
                prompts=ids * width,
                max_new=8 if options.quick else 24,
                batch=width,
                apart=False,
            )
            beam = replace(
                null,
                name=f"width {width}",
                techniques=(f"search=beam(width={width})",),
                prompts=ids,
                batch=1,
                seats=width,
            )
            yield options.compare(model, null, [beam], f"{width} beams")


if __name__ == "__main__":
    sys.exit(main("search=beam", "bench.search.beam", measure, NOTES))
