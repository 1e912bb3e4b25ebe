"""accept=big_little beside the race: how many guesses stand within a distance from the target.

python -m bench.accept.big_little [--quick] [--json]
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
DRAFT = "draft=big_little(guesses=6)"
NOTES = (
    "The null keeps the seed's tokens; what stands within the distance is another answer.",
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
                    replace(race, name="rollback 2", techniques=(DRAFT, "accept=big_little(rollback=2.0)")),
                    replace(race, name="rollback 3", techniques=(DRAFT, "accept=big_little(rollback=3.0)")),
                ]
                known = perfect(model, race, f"big_little-{model.folder.name}-{title}-{batch}", 4, options.threads)
                yield options.compare(model, race, [*others, known], title)


if __name__ == "__main__":
    sys.exit(main("accept=big_little", "bench.accept.big_little", measure, NOTES))
