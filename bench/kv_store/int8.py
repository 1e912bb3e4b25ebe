"""kv.store=int8 beside keys and values in the model's own format: memory of the cache, and what encoding and decoding cost.

python -m bench.kv_store.int8 [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.harness import Case, Options, encode, main
from bench.texts import OPENINGS, PARAGRAPHS

BATCHES = (1, 4)
NOTES = (
    "KV is what the sequences of a batch hold at most: a row of 64 numbers takes 68 bytes where float32 takes 256 and bfloat16 "
    "128, so the same memory holds 3.76 or 1.88 times the tokens. "
    "That is the bound of the format, 0.27 and 0.53 of the cache, and it is reached.",
    "On a CPU with plain operations the rows are decoded into float32 before each product: memory is saved, not time.",
    "How near the answers are: weft fidelity --with 'kv.store=int8'.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m", "qwen2.5-0.5b"):
        texts = [f"{' '.join(PARAGRAPHS[i:] + PARAGRAPHS[:i])} {OPENINGS[i]}" for i in range(len(OPENINGS))]
        prompts = [ids[-320:] for ids in encode(model, texts)]
        for batch in BATCHES[:1] if options.quick or model.large else BATCHES:
            null = Case(
                name="the model's format",
                prompts=prompts[: max(batch, 2)],
                max_new=8 if options.quick else 32,
                batch=batch,
            )
            int8 = replace(null, name="int8", techniques=("kv.store=int8",))
            yield options.compare(model, null, [int8], "prompts of 320 tokens")


if __name__ == "__main__":
    sys.exit(main("kv.store=int8", "bench.kv_store.int8", measure, NOTES))
