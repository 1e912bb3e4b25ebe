"""accept=rejection beside the race: how many of a draft's guesses stand when they are weighed instead of raced.

python -m bench.accept.rejection [--quick] [--json]
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
LAWS: dict[str, dict[str, Any]] = {
    "temperature 0.8": {"temperature": 0.8, "top_p": 0.95},
    "temperature 1": {"temperature": 1.0},
}
DRAFT = "draft=speculative_sampling(guesses=4)"
NOTES = (
    "The draft is the one that ships with weft, and so is its noise: for the race it draws by the target's own, so that the two "
    "agree about as often as their laws overlap; for rejection by noise of its own. The null keeps the seed's tokens, rejection "
    "keeps their law alone.",
    "Perfect draft: it knows the race's answer and costs nothing, so that every guess stands: no rule accepts more.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m"):
        for batch in BATCHES[:1] if options.quick else BATCHES:
            for title, law in LAWS.items():
                prompts = encode(model, OPENINGS)[: 2 if options.quick else None]
                race = Case(
                    name="race", prompts=prompts, techniques=(DRAFT,), sampling=law,
                    max_new=12 if options.quick else 32, batch=batch,
                )  # fmt: skip
                rejection = replace(race, name="rejection", techniques=(DRAFT, "accept=rejection"))
                known = perfect(model, race, f"rejection-{model.folder.name}-{title}-{batch}", 4, options.threads)
                yield options.compare(model, race, [rejection, known], title)


if __name__ == "__main__":
    sys.exit(main("accept=rejection", "bench.accept.rejection", measure, NOTES))
