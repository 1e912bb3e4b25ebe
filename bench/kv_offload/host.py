"""kv.offload=host beside the pool alone: the time of prompts whose beginnings were computed before, and pushed out.

python -m bench.kv_offload.host [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from bench.harness import Options, main
from bench.kv_offload import NOTES, asked_in_turns


def measure(options: Options) -> Iterator[dict[str, Any]]:
    yield from asked_in_turns(options, [("host", "kv.offload=host")])


if __name__ == "__main__":
    sys.exit(main("kv.offload=host", "bench.kv_offload.host", measure, NOTES))
