"""accept=spectr beside the race: how many guesses of several paths stand when they are weighed by k-SEQ.

python -m bench.accept.spectr [--quick] [--json]
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
DRAFT = "draft=paths(paths=2, length=3)"
NOTES = (
    "For the race the paths are the first of the draft's own race; for the others they are drawn alike, by noise of their own.",
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
                others = [
                    replace(race, name="k-SEQ", techniques=(DRAFT, "accept=spectr")),
                    replace(race, name="rejection", techniques=(DRAFT, "accept=rejection")),
                ]
                known = perfect(model, race, f"spectr-{model.folder.name}-{title}-{batch}", 4, options.threads)
                yield options.compare(model, race, [*others, known], title)


if __name__ == "__main__":
    sys.exit(main("accept=spectr", "bench.accept.spectr", measure, NOTES))
