"""draft=clover beside no draft and beside a draft model: the shipped heads guess for the bundled model, and for that model grown.

python -m bench.draft.clover [--quick] [--json]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.draft.heads import fitted, heads_file
from bench.draft.law import Heads
from bench.harness import Case, Options, encode, main
from bench.oracle import perfect
from bench.texts import OPENINGS
from weft.models import load_spec
from weft.models.layout import parameters

BATCHES = (1, 4)
LAWS: dict[str, dict[str, Any]] = {"greedy": {}, "temperature 0.8": {"temperature": 0.8, "top_p": 0.95}}
NOTES = (
    "The heads are those that ship with weft, of 131,168 parameters, taught for eight minutes on one thread with the bundled "
    "model's own texts; the grown model's are the same, widened.  The draft model is the one that ships, of 1.5 M parameters.",
    "Perfect draft: it knows the answer, costs nothing, and all of its 4 guesses stand.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m", "qwen2.5-0.5b"):
        file = fitted(heads_file("bundled"), model)
        share = Heads(file).parameters / parameters(load_spec(model.folder))
        weights = repr(os.path.relpath(file))  # results tell nothing of this machine
        for batch in BATCHES[:1] if options.quick or model.large else BATCHES:
            for title, law in list(LAWS.items())[: 1 if model.large else None]:
                prompts = encode(model, OPENINGS)[: max(batch, 2)]
                null = Case(
                    name="no draft", prompts=prompts, sampling=law, max_new=12 if options.quick else 32, batch=batch,
                    engine={"draft_control": "off"},
                )  # fmt: skip
                parts = {
                    f"{n} heads, {share:.2%} of the model": f"draft=clover(guesses={n}, weights={weights})"
                    for n in (2, 4)
                }
                parts["draft model, 4 guesses"] = "draft=speculative_sampling(guesses=4)"
                cases = [replace(null, name=name, techniques=(part,)) for name, part in parts.items()]
                cases.append(perfect(model, null, f"clover-{model.folder.name}-{title}-{batch}", 4, options.threads))
                yield options.compare(model, null, cases, title)


if __name__ == "__main__":
    sys.exit(main("draft=clover", "bench.draft.clover", measure, NOTES))
