"""draft=pearl beside no draft, and beside the same draft models that take turns with the target.

python -m bench.draft.pearl [--quick] [--threads 2] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.harness import Case, Options, encode, grown, main
from bench.oracle import perfect
from bench.texts import OPENINGS

LAW: dict[str, Any] = {"temperature": 0.8}
NOTES = (
    "Take it with two threads: of these the draft model has one under draft=pearl, and the target the other.",
    "The draft that ships costs the grown model a few percent of a pass for each guess. The dear one is the bundled model in the "
    "body of a model of 135 million parameters: its guesses all stand, and each takes about a quarter of the target's pass.",
    "Perfect draft: it knows the answer, costs nothing, and all of its guesses stand, as many as the drafts beside it have.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("qwen2.5-0.5b"):
        prompts = encode(model, OPENINGS)[:2]
        null = Case(
            name="no draft", prompts=prompts, sampling=LAW, max_new=12 if options.quick else 32, batch=1,
            engine={"draft_control": "off"},
        )  # fmt: skip
        drafts = {"the draft that ships": ("", 4)}
        if model.large:
            dear = grown("smollm2-135m", options.model_dir, options.tick).folder
            drafts["a dear draft"] = (f", model={str(dear)!r}", 3)
        for title, (own, guesses) in drafts.items():
            cases = [
                replace(null, name=name, techniques=(f"draft={part}(guesses={guesses}{own})",))
                for name, part in (("in turns", "speculative_sampling"), ("beside", "pearl"))
            ]
            chooses = replace(cases[-1], name="beside, with the controller", engine={"draft_control": "on"})
            bound = perfect(model, null, f"pearl-{model.folder.name}-{guesses}", guesses, options.threads)
            yield options.compare(model, null, [*cases, chooses, bound], title)


if __name__ == "__main__":
    sys.exit(main("draft=pearl", "bench.draft.pearl", measure, NOTES))
