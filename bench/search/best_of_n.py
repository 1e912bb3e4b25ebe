"""search=best_of_n beside as many requests for one answer each: what it costs to draw them where the prompt is computed once.

python -m bench.search.best_of_n [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.harness import Case, Model, Options, encode, main
from bench.texts import PARAGRAPHS

N = 4
LENGTHS = (32, 256)
"""Tokens of the prompt."""
NOTES = (
    "Bound of memory: answers of R tokens to a prompt of P have P + 4 R of 4 (P + R) entries, 0.57 at 32 tokens and 0.31 at 256; "
    "blocks of 16 that are not full make it more. Bound of time: the prompt computed once instead of 4 times.",
    f"The null is {N} requests with the same prompt, each of which computes it; nothing is cached between requests. Tokens a "
    "second count all that are drawn, those of candidates that lose too, over the whole time, prompts included.",
    "Candidates that cannot win any more are stopped, so fewer tokens are drawn in all than the null draws.",
    "Tokens are not compared: the null draws each of its answers under another seed.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m"):
        for length in LENGTHS[:1] if options.quick else LENGTHS:
            null = load(model, length, 8 if options.quick else 24)
            best = [
                replace(null, name=f"best of {N} by {by}", techniques=(f"search=best_of_n(n={N}, by='{by}')",), seats=N,
                        prompts=null.prompts[::N], batch=null.batch // N)
                for by in ("mean", "sum")
            ]  # fmt: skip
            yield options.compare(model, null, best, f"prompts of {length} tokens")


def load(model: Model, length: int, new: int) -> Case:
    ids = [tuple(x * 9)[:length] for x in encode(model, PARAGRAPHS[:1])]
    law = {"temperature": 0.8, "top_p": 0.95}
    prompts = [x for x in ids for _ in range(N)]
    return Case(name=f"{N} requests", prompts=prompts, max_new=new, batch=len(prompts), sampling=law, apart=False)


if __name__ == "__main__":
    sys.exit(main("search=best_of_n", "bench.search.best_of_n", measure, NOTES))
