"""draft=vocabtrim beside no draft and beside the same draft with its whole head.

python -m bench.draft.vocabtrim [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.harness import Case, Options, encode, main
from bench.said import said
from bench.texts import OPENINGS

BATCHES = (1, 4)
LAWS: dict[str, dict[str, Any]] = {"greedy": {}, "temperature 0.8": {"temperature": 0.8, "top_p": 0.95}}
KEPT = (256, 1024, 2048)
NOTES = (
    "The draft is the one that ships with weft: of width 256, of whose 2.7 M weights the head's 4,096 rows are 1 M. "
    "The tokens kept are the commonest of 65,536 that the bundled model wrote at temperature 0.8, from other beginnings.",
    "The whole head: draft=speculative_sampling with the same draft and as many guesses.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m"):
        for batch in (1,) if options.quick or model.grown else BATCHES:
            for title, law in LAWS.items():
                prompts = encode(model, OPENINGS)[: max(batch, 2)]
                new = 12 if options.quick else 32 if model.grown else 40
                null = Case(name="no draft", prompts=prompts, sampling=law, max_new=new, batch=batch)
                text = said()
                parts = {f"{n} of 4,096": f"draft=vocabtrim(text={text!r}, keep={n})" for n in KEPT}
                parts["the whole head"] = "draft=speculative_sampling"
                cases = [replace(null, name=name, techniques=(part,)) for name, part in parts.items()]
                yield options.compare(model, null, cases, title)


if __name__ == "__main__":
    sys.exit(main("draft=vocabtrim", "bench.draft.vocabtrim", measure, NOTES))
