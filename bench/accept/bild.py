"""accept=bild beside the race and beside rejection: how many more of a draft's guesses stand, and what that brings.

python -m bench.accept.bild [--quick] [--json]
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
DRAFT = "draft=speculative_sampling(guesses=4)"
CASES = {"rollback 2": "bild(rollback=2)", "rollback 4": "bild(rollback=4)", "rejection": "rejection"}
NOTES = (
    "The draft is the one that ships with weft, and makes as many guesses for every rule; its own half of the paper is measured "
    "as draft=bild. The null keeps the seed's tokens, rejection keeps their law, the rollback keeps neither: what it does to "
    "answers is in docs/speculation.md.",
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
                cases = [replace(race, name=name, techniques=(DRAFT, f"accept={rule}")) for name, rule in CASES.items()]
                cases.append(perfect(model, race, f"bild-{model.folder.name}-{title}-{batch}", 4, options.threads))
                yield options.compare(model, race, cases, title)


if __name__ == "__main__":
    sys.exit(main("accept=bild", "bench.accept.bild", measure, NOTES))
