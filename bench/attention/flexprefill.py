"""attention=flexprefill beside dense attention: the time of a long prompt, at several shares of the attention.

python -m bench.attention.flexprefill [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from bench.harness import Case, Options, encode, main
from bench.texts import OPENINGS, PARAGRAPHS

GAMMAS = (0.95, 0.9, 0.6)
NOTES = (
    "One block and its own: hardly more than the blocks that are always seen, the first and the rows' own: the most that leaving "
    "out can bring, at whatever answers.",
    "The prompt is prose that goes through eight texts in ever new orders; max_new is small, so the prompt is what is timed.",
    "density: blocks_computed / (blocks_computed + blocks_skipped), of the blocks that a causal mask leaves.",
    "minimum is 256 instead of the default 1024, which on prompts of so few tokens would be much of the prompt.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    tokens = 1000 if options.quick else 3600
    for model in options.models("smollm2-135m"):
        texts = encode(model, [*PARAGRAPHS, *OPENINGS])
        order = (texts[(i * i + i // 8) % len(texts)] for i in range(tokens))
        prompt = tuple(islice((t for one in order for t in one), tokens))
        dense = Case(name="dense attention", prompts=[prompt], max_new=4)
        cases = [
            replace(dense, name=f"gamma {g}", techniques=(f"attention=flexprefill(gamma={g}, minimum=256)",))
            for g in (GAMMAS[1:2] if options.quick else GAMMAS)
        ]
        least = "attention=flexprefill(gamma=0.001, minimum=0)"
        cases.append(replace(dense, name="one block and its own", techniques=(least,), bound=True))
        yield options.compare(model, dense, cases, f"a prompt of {tokens} tokens")


if __name__ == "__main__":
    sys.exit(main("attention=flexprefill", "bench.attention.flexprefill", measure, NOTES))
