"""draft=hierarchy beside no draft: questions that come again, answers that quote, and ordinary prose, with and without a text.

python -m bench.draft.hierarchy [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.draft.trie import chosen
from bench.harness import Options, main
from bench.oracle import perfect
from bench.said import said

BATCHES = (1, 4)
NOTES = (
    "Two stores: context and answers. Three stores: beside them 65,536 tokens that the bundled model wrote at temperature 0.8, "
    "from other beginnings.",
    "Asked again, quoting and ordinary are the loads of draft=trie.",
    "Perfect draft: it knows the answer, costs nothing, and all of its 6 guesses stand.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    stacks = {"two stores": "draft=hierarchy", "three stores": f"draft=hierarchy(text={said()!r})"}
    for model in options.models("smollm2-135m"):
        for batch in (1,) if options.quick or model.grown else BATCHES:
            for title, null in chosen(model, batch, options.quick):
                cases = [replace(null, name=name, techniques=(part,)) for name, part in stacks.items()]
                bound = perfect(model, null, f"hierarchy-{model.folder.name}-{title}-{batch}", 6, options.threads)
                yield options.compare(model, null, [*cases, bound], title)


if __name__ == "__main__":
    sys.exit(main("draft=hierarchy", "bench.draft.hierarchy", measure, NOTES))
