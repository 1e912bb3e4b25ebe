"""kv.compress=streaming_llm beside the whole cache, and beside a window of as many entries without sinks.

python -m bench.kv_compress.streaming_llm [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.harness import Options, main
from bench.loads import loads

NOTES = (
    "Bound of memory: 160 of 840 entries are 0.19 of the cache, which is reached. Bound of the answers: the null, which "
    "keeps everything.",
    "128 entries stay at a cut, 160 stand at most. What dropping the others costs in answers is in the head of the technique's "
    "file (perplexity and KL along novels); `same_tokens` only says where greedy answers part.",
    "The bundled model leans on what is near and has no sinks: a window without the first tokens is as good here. The paper "
    "shows large models lose their bearings without them; nothing in this repository reproduces that.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    for model in options.models("smollm2-135m"):
        for title, null in loads(model, quick=options.quick):
            streaming = replace(
                null,
                name="streaming_llm",
                techniques=("kv.compress=streaming_llm(sinks=4,window=124,every=32)",),
            )
            recent = replace(null, name="recent", techniques=("kv.compress=recent(window=128,every=32)",))
            yield options.compare(model, null, [streaming, recent], title)


if __name__ == "__main__":
    sys.exit(main("kv.compress=streaming_llm", "bench.kv_compress.streaming_llm", measure, NOTES))
