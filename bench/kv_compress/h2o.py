"""kv.compress=h2o beside the whole cache, and beside a window and a lot of as many entries.

python -m bench.kv_compress.h2o [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.harness import Options, main
from bench.loads import loads

NOTES = (
    "Bound of memory: 160 of 840 entries are 0.19 of the cache, which is reached; with as many entries no choice holds less. "
    "Bound of the answers: the null, which keeps everything.",
    "128 entries stay at a cut, 160 stand at most. What dropping the others costs in answers is in the head of the technique's "
    "file (perplexity and KL along novels); `same_tokens` only says where greedy answers part.",
    "What H2O costs beside a window is the attention mass: scores of the rows that count are computed twice more. On the small "
    "model an operation's own overhead weighs as much as its arithmetic, so the share is larger than on the grown ones.",
    "The bundled model leans on what is near: heavy hitters are no better there than a window of as many entries.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m", "qwen2.5-0.5b"):
        for title, null in loads(model, quick=options.quick):
            h2o = replace(null, name="h2o", techniques=("kv.compress=h2o(heavy=64,recent=64,every=32)",))
            recent = replace(null, name="recent", techniques=("kv.compress=recent(window=128,every=32)",))
            lot = replace(null, name="random", techniques=("kv.compress=random(chosen=64,recent=64,every=32)",))
            yield options.compare(model, null, [h2o, recent, lot], title)


if __name__ == "__main__":
    sys.exit(main("kv.compress=h2o", "bench.kv_compress.h2o", measure, NOTES))
