"""Go on with the ledger of pairs: test those that it does not hold as they are now, for so many minutes.

    python -m tools.pairs                             # 7 minutes, the pairs of any slot
    python -m tools.pairs --of draft,accept --minutes 20
    python -m tools.pairs --of draft=dyspec --list    # which are open; tests none

`make test-long` tests all of them anew; this takes up where files of techniques changed, or where a run ended early.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from weft.conform import pairs
from weft.conform.lab import Lab

LEDGER = Path(__file__).resolve().parents[1] / "bench" / "results" / "pairs.json"
DRAWS = 2048
"""Of a law: twice what a changed pair is tested with on each run, and less than half of what `make test-long` takes."""


def read(ledger: Path) -> dict[str, dict[str, Any]]:
    """The records by pair; none where there is no ledger."""
    found: dict[str, dict[str, Any]] = json.loads(ledger.read_text())["pairs"] if ledger.is_file() else {}
    return found


def write(ledger: Path, told: dict[str, dict[str, Any]]) -> None:
    """In one piece: who is interrupted leaves the ledger as it was."""
    ledger.parent.mkdir(parents=True, exist_ok=True)
    whole = ledger.with_suffix(".new")
    whole.write_text(json.dumps({"pairs": dict(sorted(told.items()))}, indent=1) + "\n")
    whole.replace(ledger)


def entry(lab: Lab, pair: pairs.Pair, draws: int) -> dict[str, Any]:
    """The record of a pair, tested now.  One that fails has no digest, so that it stays open."""
    began = time.monotonic()
    try:
        text, ok = pairs.check(lab, pair, draws), True
    except Exception as error:
        text, ok = f"{type(error).__name__}: {error}", False
    took = round(time.monotonic() - began, 1)
    return {"ok": ok, "digest": pairs.digest(pair) if ok else "", "text": text, "seconds": took}


def open_pairs(told: dict[str, dict[str, Any]], of: Iterable[str] = ()) -> list[pairs.Pair]:
    """Pairs that were never tested come first, and of each kind those of no schedule.  of: slots, or techniques as
    'slot=name', of which one side has to be; none for all."""
    wanted = set(of)
    found = [
        pair
        for pair in pairs.pairs()
        if told.get(str(pair), {}).get("digest") != pairs.digest(pair)
        and (not wanted or wanted & {name for side in (pair.one, pair.other) for name in (side[0], "=".join(side))})
    ]
    return sorted(found, key=lambda p: (str(p) in told, p.one[0] == "schedule"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.pairs", description="Test pairs that are open.")
    parser.add_argument("--of", default="", help="slots or techniques (slot=name), with commas; else all")
    parser.add_argument("--minutes", type=float, default=7.0, help="begin no pair after so many (7)")
    parser.add_argument("--draws", type=int, default=DRAWS, help=f"of a law ({DRAWS})")
    parser.add_argument("--ledger", type=Path, default=LEDGER)
    parser.add_argument("--list", action="store_true", help="name the open pairs and test none")
    flags = parser.parse_args(argv)
    began, told = time.monotonic(), read(flags.ledger)
    todo = open_pairs(told, filter(None, flags.of.split(",")))
    if flags.list:
        print("\n".join(map(str, todo)))
        return 0
    lab, failed, done = Lab(), list[str](), 0
    for pair in todo:
        if time.monotonic() - began > 60 * flags.minutes:
            break
        told[str(pair)] = found = entry(lab, pair, flags.draws)
        write(flags.ledger, told)
        done += 1
        print(f"{found['seconds']:6.1f} s  {pair}: {found['text']}", flush=True)
        if not found["ok"]:
            failed.append(str(pair))
    print(f"{done} pairs tested, {len(todo) - done} open, failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
