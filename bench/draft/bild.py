"""draft=bild beside no draft: a draft that stops where it is not sure, under the race and under the paper's own rollback.

python -m bench.draft.bild [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.harness import Case, Options, encode, main
from bench.oracle import perfect
from bench.texts import OPENINGS

BATCHES = (1, 4)
LAWS: dict[str, dict[str, Any]] = {"greedy": {}, "temperature 0.8": {"temperature": 0.8}}
CASES = {
    "fallback 0.1": ("draft=bild(fallback=0.1)",),
    "fallback 0.3": ("draft=bild(fallback=0.3)",),
    "fallback 0.1, rollback 2": ("draft=bild(fallback=0.1)", "accept=bild(rollback=2)"),
    "4 guesses": ("draft=speculative_sampling(guesses=4)",),
}
NOTES = (
    "The draft is the one that ships with weft, which is seldom sure. Fallback 0.1 and 0.3 are exact; with the rollback answers "
    "are others (docs/speculation.md). The last is the same model with as many guesses in every step.",
    "Perfect draft: it knows the answer, costs nothing, and all of its 8 guesses stand.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m"):
        for batch in BATCHES[:1] if options.quick else BATCHES:
            for title, law in LAWS.items():
                prompts = encode(model, OPENINGS)[: 2 if options.quick else None]
                null = Case(
                    name="no draft", prompts=prompts, sampling=law, max_new=12 if options.quick else 32, batch=batch
                )
                cases = [replace(null, name=name, techniques=parts) for name, parts in CASES.items()]
                cases.append(perfect(model, null, f"bild-{model.folder.name}-{title}-{batch}", 8, options.threads))
                yield options.compare(model, null, cases, title)


if __name__ == "__main__":
    sys.exit(main("draft=bild", "bench.draft.bild", measure, NOTES))
