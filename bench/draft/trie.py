"""draft=trie beside no draft: questions that come again, answers that quote, and ordinary prose.

python -m bench.draft.trie [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.draft.ngram import loads
from bench.harness import Case, Model, Options, encode, main
from bench.oracle import perfect
from bench.texts import OPENINGS

BATCHES = (1, 4)
TIMES = 3
NOTES = (
    f"Asked again: each of two questions (of one, on the grown model) comes {TIMES} times, greedily; the first time nothing is "
    "known of its answer.  draft=ngram has no memory of other requests: what it gains here is what answers repeat of themselves.",
    "Quoting and ordinary are the loads of draft=ngram.",
    "Perfect draft: it knows the answer, costs nothing, and all of its 8 guesses stand.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m"):
        for batch in (1,) if options.quick or model.grown else BATCHES:
            for title, null in chosen(model, batch, options.quick):
                cases = [replace(null, name=name, techniques=(f"draft={name}",)) for name in ("trie", "ngram")]
                bound = perfect(model, null, f"trie-{model.folder.name}-{title}-{batch}", 8, options.threads)
                yield options.compare(model, null, [*cases, bound], title)


def chosen(model: Model, batch: int, quick: bool) -> Iterator[tuple[str, Case]]:
    """The loads: all three on the bundled model, for one sequence; else without the quoting."""
    new = 16 if quick else 32 if model.grown else 40
    asked = encode(model, [f"<|user|>{text} What came then?<|end|><|assistant|>" for text in OPENINGS[:2]])
    asked = asked[: 1 if model.grown else 2] * TIMES
    yield "asked again", Case(name="no draft", prompts=asked, max_new=new, batch=min(batch, 2))
    for title, null in loads(model, batch, new):
        if title != "quoting" or (batch == 1 and not model.grown):
            yield title, null


if __name__ == "__main__":
    sys.exit(main("draft=trie", "bench.draft.trie", measure, NOTES))
