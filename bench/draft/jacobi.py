"""draft=jacobi beside no draft: answers that quote, and ordinary prose.

python -m bench.draft.jacobi [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.draft.ngram import loads
from bench.harness import Options, main
from bench.oracle import perfect

BATCHES = (1, 4)
CASES = {"window 5": "draft=jacobi", "without the pool": "draft=jacobi(pool=0)", "window 10": "draft=jacobi(window=10)"}
NOTES = (
    "Quoting and ordinary are the loads of draft=ngram: greedy, and at temperature 0.8.",
    "Perfect draft: it knows the answer, costs nothing, and all of its 5 guesses stand.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m"):
        for batch in (1,) if options.quick or model.grown else BATCHES:
            for title, null in loads(model, batch, 16 if options.quick else 32 if model.grown else 40):
                cases = [replace(null, name=name, techniques=(part,)) for name, part in CASES.items()]
                bound = perfect(model, null, f"jacobi-{model.folder.name}-{title}-{batch}", 5, options.threads)
                yield options.compare(model, null, [*cases, bound], title)


if __name__ == "__main__":
    sys.exit(main("draft=jacobi", "bench.draft.jacobi", measure, NOTES))
