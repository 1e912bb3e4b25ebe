"""Each operation of the kernels by itself, beside what this machine can do: products of every format and row count, attention,
what stands between them, a mixture's parts, draws, and what makes weights into panels.

    python -m bench.operations [--json] [--threads 2] [--isa auto] [--only product]

An operation runs over so many different weights, or keys and values, that no cache holds them, and they are read from memory as
in a step.  `limit_s` is the longer of two times: bytes over the bandwidth, and multiplications and additions over the arithmetic
in registers, by the same threads, both measured before and after each round of each operation, since a shared machine's speed
moves.  `fraction` is the median over the rounds.  Writes bench/results/operations.json; with --only the operations of that part,
where the file is of this kind of machine, beside what it holds of the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from bench.harness import RESULTS, machine, write
from bench.operations.between import between, draws
from bench.operations.entries import attention, entries
from bench.operations.products import experts, opened, packing, products
from bench.operations.timing import Bench

PARTS: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "product": products, "opened": opened, "attention": attention, "entries": entries, "between": between, "experts": experts,
    "draw": draws, "packing": packing,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--json", action="store_true", help="print the record, and write no file")
    options = parser.parse_args()
    from weft import native

    module = native.module()
    if module is None:
        sys.exit("weft's kernels are not built here; see CONTRIBUTING.md")
    bench = Bench(module, options.threads, options.isa)
    of = {"benchmark": "operations", "machine": machine(), "threads": options.threads, "isa": bench.program.isa}
    path = RESULTS / "operations.json"
    kept = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    merges = options.only is not None and not options.json
    if merges and any(kept.get(key) != value for key, value in of.items()):
        sys.exit(
            f"{path.name} is not of this machine, --isa and --threads, and stays as it is; run every part, or take --json"
        )
    found = []
    for name, part in PARTS.items():
        if options.only in (None, name):
            for record in part(bench):
                found.append(record)
                if not options.json:
                    said = " ".join(f"{v}" for k, v in record.items() if k != "kernel" and not isinstance(v, float))
                    print(
                        f"{said:<48} {record['seconds'] * 1e6:10.1f} us  {record['gb_s']:6.1f} GB/s  "
                        f"{record['gop_s']:7.1f} Gop/s  {record['fraction']:5.2f} of the limit",
                        flush=True,
                    )
    told = {**of, "read_gb_s": median(r["read_gb_s"] for r in found), "results": found}
    if options.json:
        print(json.dumps(told))
    else:
        write(path, {**kept, "results": beside(kept["results"], found)} if merges else told)


def beside(kept: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was found in the place of what was kept of the same operations, and behind the others where there was nothing."""
    names = {record["operation"] for record in found}
    others = [record for record in kept if record["operation"] not in names]
    at = next((i for i, record in enumerate(kept) if record["operation"] in names), len(kept))
    return [*others[:at], *found, *others[at:]]


if __name__ == "__main__":
    main()
