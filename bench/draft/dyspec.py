"""draft=dyspec beside no draft: trees of guesses from the shipped draft, and a chain of as many passes.

python -m bench.draft.dyspec [--quick] [--json]
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
CASES = {
    "tree of 4": "draft=dyspec(guesses=4, depth=3)",
    "tree of 8": "draft=dyspec(guesses=8, depth=4)",
    "chain of 4": "draft=speculative_sampling(guesses=4)",
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
                cases = [replace(null, name=name, techniques=(text,)) for name, text in CASES.items()]
                known = perfect(model, null, f"dyspec-{model.folder.name}-{title}-{batch}", 4, options.threads)
                yield options.compare(model, null, [*cases, known], title)


if __name__ == "__main__":
    sys.exit(main("draft=dyspec", "bench.draft.dyspec", measure, NOTES))
