"""draft=paths beside no draft: several paths of the shipped draft, raced and weighed, and one path alone.

python -m bench.draft.paths [--quick] [--json]
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
LAWS: dict[str, dict[str, Any]] = {"greedy": {}, "temperature 0.8": {"temperature": 0.8, "top_p": 0.95}}
CASES: dict[str, tuple[str, ...]] = {
    "2 paths of 3": ("draft=paths(paths=2, length=3)",),
    "2 paths of 3, k-SEQ": ("draft=paths(paths=2, length=3)", "accept=spectr"),
    "1 path of 3": ("draft=speculative_sampling(guesses=3)",),
}
NOTES = (
    "The draft is the one that ships with weft, trained to agree with the bundled model. The grown model computes "
    "what the bundled one does at the cost of its shape, so the guesses are as good, and cost next to nothing beside it.",
    "Perfect draft: it knows the answer, costs nothing, and all of its 4 guesses stand.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m"):
        for batch in BATCHES[:1] if options.quick else BATCHES:
            for title, law in LAWS.items():
                prompts = encode(model, OPENINGS)[: max(batch, 2)]
                null = Case(
                    name="no draft", prompts=prompts, sampling=law, max_new=12 if options.quick else 32, batch=batch
                )
                cases = [replace(null, name=name, techniques=parts) for name, parts in CASES.items()]
                known = perfect(model, null, f"paths-{model.folder.name}-{title}-{batch}", 4, options.threads)
                yield options.compare(model, null, [*cases, known], title)


if __name__ == "__main__":
    sys.exit(main("draft=paths", "bench.draft.paths", measure, NOTES))
