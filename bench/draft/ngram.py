"""draft=ngram beside no draft: where answers quote their prompts, and on ordinary prose where there is nothing to look up.

python -m bench.draft.ngram [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.harness import Case, Model, Options, encode, main
from bench.oracle import perfect
from bench.texts import OPENINGS, PARAGRAPHS

BATCHES = (1, 4)
END = "<|end|>"
TURN = "<|user|>{0}<|end|><|assistant|>{0}<|end|>"
NOTES = (
    "Quoting: a chat in which each answer says the question again; the last answer's first words are given, and it is greedy. "
    "The small model quotes badly, and repeats itself instead: to a technique that looks up what was said it is the same.",
    "Ordinary: prose is continued at temperature 0.8 and top-p 0.95, where it repeats little.",
    "Perfect draft: it knows the answer, costs nothing, and all of its 5 guesses stand: no draft of as many can bring more.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m"):
        for batch in BATCHES[:1] if options.quick else BATCHES:
            for title, null in loads(model, batch, 16 if options.quick else 40):
                ngram = replace(null, name="ngram", techniques=("draft=ngram",))
                known = perfect(model, null, f"ngram-{model.folder.name}-{title}-{batch}", 5, options.threads)
                yield options.compare(model, null, [ngram, known], title)


def loads(model: Model, batch: int, new: int) -> Iterator[tuple[str, Case]]:
    asks = [TURN.format(text) + TURN.format(text)[: -len(END)][: -len(text) + 40] for text in PARAGRAPHS]
    count = max(batch, 2)
    quoting = Case(name="no draft", prompts=encode(model, asks)[:count], max_new=new, batch=batch)
    law = {"temperature": 0.8, "top_p": 0.95}
    yield "quoting", quoting
    yield "ordinary", replace(quoting, prompts=encode(model, OPENINGS)[:count], sampling=law)


if __name__ == "__main__":
    sys.exit(main("draft=ngram", "bench.draft.ngram", measure, NOTES))
