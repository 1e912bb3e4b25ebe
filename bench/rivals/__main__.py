"""Measure weft beside other engines on this machine, in turns.

    python -m bench.rivals --only llama.cpp --shapes qwen2.5-0.5b --formats bf16,int8 --batch 1,16

writes rivals.json, rivals.md and rivals.svg into bench/results.  Exit status 1: a figure can't be right (or a rival
is slower than it was on the same processor), or weft has none.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from bench.harness import machine, write
from bench.rivals import plan as plans
from bench.rivals import report, rows
from bench.rivals.measure import Group, measure
from weft.cli._terminal import unwinding
from weft.errors import EngineError


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    began = time.monotonic()
    try:
        plan = plans.parse(given)
        with unwinding():
            groups, absent, install_s = measure(plan, plans.rivals(), Teller())
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nended; nothing is written", file=sys.stderr)
        return 130
    command = ["python", "-m", "bench.rivals", *without_places(given)]
    seconds = time.monotonic() - began
    record = record_of(plan, groups, absent, command, seconds=seconds, install_seconds=install_s)
    write(plan.out / "rivals.json", record)
    (plan.out / "rivals.md").write_text(report.markdown(record), encoding="utf8")
    (plan.out / "rivals.svg").write_text(report.svg(record), encoding="utf8")
    print(report.markdown(record))
    return verdict(record)


def without_places(given: Sequence[str]) -> list[str]:
    """A command line without the flags that say where things lie, which another machine has elsewhere."""
    kept, words = [], iter(given)
    for word in words:
        flag, _, value = word.partition("=")
        if flag in ("--cache", "--out", "--pip-args"):
            if not value:
                next(words, None)
        else:
            kept.append(word)
    return kept


def record_of(
    plan: plans.Plan,
    groups: Sequence[Group],
    absent: dict[str, str],
    command: Sequence[str],
    *,
    seconds: float,
    install_seconds: float,
) -> dict[str, Any]:
    """Everything that is kept of a run.  seconds: that it took, those of installing engines among them."""
    found = [row for group in groups for row in rows.rows_of(group)]
    elsewhere = rows.other_machine()
    slow = rows.suspicions(found, elsewhere)
    # Another processor may be slower at the same arithmetic; on the same one the harness has set something wrongly.
    alike = rows.is_alike(elsewhere, plan.threads)
    return {
        "command": " ".join(command),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "threads": plan.threads,
        "cores": list(plan.cores),
        "memory_bytes": plan.memory_bytes,
        "rounds": plan.rounds,
        "seconds": seconds,
        "install_seconds": install_seconds,
        "read_gb_s": sorted({row["read_gb_s"] for row in found}),
        "rows": found,
        "faults": rows.faults(found) + (slow if alike else []),
        "flags": [] if alike else slow,
        "missing": rows.missing_of(groups, absent),
        "engines": rows.engines_of(groups),
    }


def verdict(record: dict[str, Any]) -> int:
    """The exit status; what is wrong goes to stderr."""
    for text in record["flags"]:
        print(f"slower than elsewhere: {text}", file=sys.stderr)
    for text in record["faults"]:
        print(f"void: {text}", file=sys.stderr)
    if not any(row["engine"] == "weft" for row in record["rows"]):
        print("void: weft itself was not measured", file=sys.stderr)
        return 1
    return 1 if record["faults"] else 0


class Teller:
    """Says what is being done: on a terminal in one line, elsewhere a line for each thing, seconds that pass left out."""

    def __init__(self) -> None:
        self.last = ""

    def __call__(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text[:110]}", end="", file=sys.stderr, flush=True)
            return
        stem, _, end = text.rpartition(", ")
        what = stem if end.endswith(" s") and end[:-2].isdigit() else text
        if what != self.last:
            print(what, file=sys.stderr, flush=True)
        self.last = what


if __name__ == "__main__":
    sys.exit(main())
