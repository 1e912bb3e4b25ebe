"""draft=early_exit beside no draft, with the exit that it chooses and with exits that stay.

python -m bench.draft.early_exit [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.harness import Case, Options, encode, main
from bench.texts import OPENINGS

BATCHES = (1, 4)
LAWS: dict[str, dict[str, Any]] = {"greedy": {}, "temperature 0.8": {"temperature": 0.8}}
PARTS = {
    "chosen in every step": "draft=early_exit",
    "2 layers, 2 guesses": "draft=early_exit(exit=2, guesses=2)",
    "6 layers, 2 guesses": "draft=early_exit(exit=6, guesses=2)",
}
NOTES = ("The model has 8 layers, and was not trained to leave early.",)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models():
        for batch in (1,) if options.quick else BATCHES:
            for title, law in LAWS.items():
                prompts = encode(model, OPENINGS)[: max(batch, 2)]
                new = 12 if options.quick else 40
                null = Case(name="no draft", prompts=prompts, sampling=law, max_new=new, batch=batch)
                cases = [replace(null, name=name, techniques=(part,)) for name, part in PARTS.items()]
                yield options.compare(model, null, cases, title)


if __name__ == "__main__":
    sys.exit(main("draft=early_exit", "bench.draft.early_exit", measure, NOTES))
