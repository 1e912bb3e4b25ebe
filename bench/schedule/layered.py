"""schedule=layered and prefill_first beside chunks of tokens: long prompts that come among short ones which decode meanwhile.

python -m bench.schedule.layered [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

from bench.contender import ROOT
from bench.harness import Case, Model, Options, bundled, encode, main
from bench.texts import OPENINGS, PARAGRAPHS

SHORT, LONG = 4, 2
LENGTH = 960
"""Tokens of a long prompt."""
ROWS = 512
NOTES = (
    f"{SHORT} short prompts and {LONG} of {LENGTH} tokens are sent together, so that the short ones decode while the long ones "
    f"are computed. A step has at most {ROWS} rows: the null takes a long prompt in chunks of what the decodes leave of them, "
    "layered takes such a chunk through a quarter of the layers in each step.",
    "Chunks of 128 are what the null needs for steps as short: each of them reads all weights once more.",
    "The paper's gain is in the weights of mixtures of experts, which chunks read again and again. small-moe is one (32 experts, "
    "of which a row goes to 4) with random weights, so its rows spread over the experts more evenly than a trained one's; the "
    "other models are dense.",
    "Bound of slow steps: a step with decodes alone, which no schedule that computes prompts beside them can reach.",
    "prefill_first computes whole prompts, in chunks of all the rows there are, while no sequence decodes.",
)
EXPERTS = Model("small-moe (random weights)", ROOT / "bench" / "shapes" / "small-moe.json", large=True)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in (*options.models("smollm2-135m"), *(() if options.quick else (EXPERTS,))):
        null = load(200 if options.quick else LENGTH, 8 if options.quick else 40)
        layered = replace(null, name="layered", techniques=("schedule=layered(groups=4)",))
        first = replace(null, name="prompts first", techniques=("schedule=prefill_first",))
        small = replace(null, name="chunks of 128", engine={**null.engine, "max_rows": ROWS // 4})
        yield options.compare(model, null, [layered, first, small], "long prompts among short ones")


def load(length: int, new: int) -> Case:
    told = bundled()  # whose tokens stand in every vocabulary
    story = list(islice(cycle(t for one in encode(told, PARAGRAPHS) for t in one), length + 97 * LONG))
    prompts = [*encode(told, OPENINGS)[:SHORT], *(story[97 * i : 97 * i + length] for i in range(LONG))]
    return Case(name="chunks", prompts=prompts, max_new=new, batch=len(prompts), engine={"max_rows": ROWS}, apart=False)


if __name__ == "__main__":
    sys.exit(main("schedule=layered", "bench.schedule.layered", measure, NOTES))
