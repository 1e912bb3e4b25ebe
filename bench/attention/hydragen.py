"""attention=hydragen beside plain attention: sequences with one long beginning, and sequences that share nothing.

python -m bench.attention.hydragen [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

from bench.harness import Case, Model, Options, encode, main
from bench.texts import OPENINGS, PARAGRAPHS

LOADS = ((16, 1024), (32, 2048))
"""Sequences at once, and tokens that all of them begin with."""
OWN = 4
NOTES = (
    "Bound: of S sequences with a shared beginning of P tokens and R of their own, (P + S R) of S (P + R) entries must be "
    "read: one in 14 with 16 sequences and 1,024 shared tokens, one in 28 with 32 and 2,048. Decoding gains less, by what else a "
    "step does.",
    "Shared: every prompt begins with the same text, which the prefix index holds once, and ends with a few tokens of its own.",
    "Nothing shared: prompts of 256 tokens that differ from the first one on: what looking for shares costs.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m"):
        small = model.name == "weft-tiny"
        for batch, shared in LOADS[:1] if options.quick or not small else LOADS:
            new = 4 if options.quick else 12
            yield told(options, model, shared_load(model, batch, shared, new), f"{shared} tokens shared")
        yield told(
            options, model, own_load(model, 8 if options.quick else 16, 4 if options.quick else 24), "nothing shared"
        )


def told(options: Options, model: Model, null: Case, title: str) -> dict[str, Any]:
    hydragen = replace(null, name="hydragen", techniques=("attention=hydragen",))
    return options.compare(model, null, [hydragen], title)


def shared_load(model: Model, batch: int, shared: int, new: int) -> Case:
    begin, tails = text(model, shared), encode(model, OPENINGS)
    prompts = [[*begin, *islice(cycle(tails[i % len(tails)]), i, i + OWN)] for i in range(batch)]
    return Case(name="plain attention", prompts=prompts, max_new=new, batch=batch, engine={"share": True})


def own_load(model: Model, batch: int, new: int) -> Case:
    ids = text(model, 256 + 7 * batch)
    prompts = [ids[7 * i : 7 * i + 256] for i in range(batch)]
    return Case(name="plain attention", prompts=prompts, max_new=new, batch=batch, engine={"share": True})


def text(model: Model, tokens: int) -> list[int]:
    """So many tokens of prose."""
    return list(islice(cycle(t for one in encode(model, PARAGRAPHS) for t in one), tokens))


if __name__ == "__main__":
    sys.exit(main("attention=hydragen", "bench.attention.hydragen", measure, NOTES))
