"""draft=prompt_tokens beside no draft, on the bundled model; on that model grown: `bench.draft.table`.

python -m bench.draft.prompt_tokens [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.harness import Case, Options, encode, main
from bench.oracle import perfect
from bench.texts import OPENINGS

SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
LOADS: tuple[tuple[int, str, dict[str, Any]], ...] = (
    (1, "greedy", {}), (1, "temperature 0.8", SAMPLED), (4, "temperature 0.8", SAMPLED),
)  # fmt: skip
NOTES = (
    "The tokens are those that ship with weft, 4 of 256 numbers each.  A step of n guesses has (1 + n) * (1 + n) rows for a "
    "sequence.",
    "Perfect draft: it knows the answer, costs nothing, and all of its 2 guesses stand; its step has 3 rows.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    (model,) = options.models()
    for batch, title, law in LOADS[:1] if options.quick else LOADS:
        prompts = encode(model, OPENINGS)[: max(batch, 2)]
        null = Case(
            name="no draft", prompts=prompts, sampling=law, max_new=12 if options.quick else 32, batch=batch,
            engine={"draft_control": "off"},
        )  # fmt: skip
        cases = [replace(null, name=f"{n} guesses", techniques=(f"draft=prompt_tokens(guesses={n})",)) for n in (1, 2)]
        cases.append(replace(cases[1], name="2 guesses, as the controller likes", engine={"draft_control": "on"}))
        cases.append(perfect(model, null, f"prompts-{title}-{batch}", 2, options.threads))
        yield options.compare(model, null, cases, title)


if __name__ == "__main__":
    sys.exit(main("draft=prompt_tokens", "bench.draft.prompt_tokens", measure, NOTES))
