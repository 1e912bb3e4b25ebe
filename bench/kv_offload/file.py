"""kv.offload=file beside the pool alone: the time of prompts whose beginnings were computed before, and pushed out.

python -m bench.kv_offload.file [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from bench.harness import Options, main
from bench.kv_offload import NOTES, asked_in_turns

MORE = (
    "Without a buffer (1 byte of memory) every block is read from the file when it is needed, most of it from the page cache.",
)


def measure(options: Options) -> Iterator[dict[str, Any]]:
    cases = [("file", "kv.offload=file"), ("file, no buffer", "kv.offload=file(memory='1')")]
    yield from asked_in_turns(options, cases)


if __name__ == "__main__":
    sys.exit(main("kv.offload=file", "bench.kv_offload.file", measure, (*NOTES, *MORE)))
