"""draft=ngram beside no draft: where answers quote their prompts, and on ordinary prose where there is nothing to look up.

python -m bench.draft.ngram [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.harness import Case, Model, Options, encode, main
from bench.texts import OPENINGS, PARAGRAPHS

BATCHES = (1, 4)
NOTES = (
    "Quoting: the user asks to have a paragraph repeated, and the answer's first words are given; greedy.",
    "Ordinary: prose is continued at temperature 0.8 and top-p 0.95; a small model at temperature 0 repeats itself, which would "
    "flatter a technique that looks up what was said.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m"):
        for batch in BATCHES[:1] if options.quick else BATCHES:
            for title, null in loads(model, batch, 16 if options.quick else 64):
                ngram = replace(null, name="ngram", techniques=("draft=ngram",))
                yield options.compare(model, null, [ngram], title)


def loads(model: Model, batch: int, new: int) -> Iterator[tuple[str, Case]]:
    asks = [f"<|user|>Repeat this text: {text}<|end|><|assistant|>{text[:40]}" for text in PARAGRAPHS]
    law = {"temperature": 0.8, "top_p": 0.95}
    yield "quoting", Case(name="no draft", prompts=encode(model, asks), max_new=new, batch=batch)
    yield "ordinary", Case(name="no draft", prompts=encode(model, OPENINGS), max_new=new, batch=batch, sampling=law)


if __name__ == "__main__":
    sys.exit(main("draft=ngram", "bench.draft.ngram", measure, NOTES))
