"""draft=speculative_sampling beside no draft: the shipped draft guesses for the bundled model, and for that model grown large.

python -m bench.draft.speculative_sampling [--quick] [--json]
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
CASES = {"2 guesses": "guesses=2", "4 guesses": "guesses=4", "adaptive": "guesses=4, adapt=True"}
NOTES = (
    "The draft is the one that ships with weft, trained to agree with the bundled model. The grown model computes "
    "what the bundled one does at the cost of its shape, so the guesses are as good, and cost next to nothing beside it.",
    "Beside the bundled model the same draft costs a quarter of a step for each guess.",
    "Perfect draft: it knows the answer, costs nothing, and all of its 4 guesses stand: what is missing to 5 times is the price "
    "of a step of five rows instead of one.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m", "qwen2.5-0.5b"):
        for batch in BATCHES[:1] if options.quick or model.large else BATCHES:
            for title, law in list(LAWS.items())[: 1 if model.large else None]:
                prompts = encode(model, OPENINGS)[: max(batch, 2)]
                null = Case(
                    name="no draft", prompts=prompts, sampling=law, max_new=12 if options.quick else 32, batch=batch
                )
                cases = [
                    replace(null, name=name, techniques=(f"draft=speculative_sampling({arguments})",))
                    for name, arguments in CASES.items()
                ]
                cases.append(
                    perfect(
                        model, null, f"speculative_sampling-{model.folder.name}-{title}-{batch}", 4, options.threads
                    )
                )
                yield options.compare(model, null, cases, title)


if __name__ == "__main__":
    sys.exit(main("draft=speculative_sampling", "bench.draft.speculative_sampling", measure, NOTES))
