"""Every check and test, and one table of what ran and what was skipped: the second half of `make test`.

    python -m tools.checks [--only style,format,types,tests,serial]
    python -m tools.checks --long [--only long,hours,long-serial]

style, format   ruff
types           mypy
tests           pytest on all cores, without the tests marked long or serial
serial          pytest alone, the tests marked serial (they measure time or memory)
long, hours, long-serial
                the same of the tests marked long, with --long and instead of all others; hours are those that take one by
                themselves.  The outcome of each goes to bench/results/test-long.json as it ends, beside what the others
                last gave, so that they may be run one by one

A failed step does not stop the later ones.  Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from weft.exec.host import cpu_count

ROOT = Path(__file__).resolve().parents[1]
LONG = ("long", "hours", "long-serial")
LONG_RESULT = ROOT / "bench" / "results" / "test-long.json"
NO_TESTS = 5
"""pytest's exit status when nothing was selected."""


@dataclass
class Outcome:
    """How one step went.  skips counts reasons; slowest holds (seconds, test)."""

    name: str
    ok: bool
    seconds: float
    tests: int = 0
    skips: Counter[str] = field(default_factory=Counter)
    slowest: list[tuple[float, str]] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run every check and test.")
    parser.add_argument("--long", action="store_true", help="only the tests marked long")
    parser.add_argument("--only", default="", help="steps to run, with commas between them")
    options = parser.parse_args(argv)
    steps = commands(min(8, cpu_count().threads))
    there = [s for s in steps if (s in LONG) == options.long]
    wanted = [s for s in options.only.split(",") if s] or there
    unknown = [s for s in wanted if s not in there]
    if unknown:
        parser.error(f"no step {', '.join(unknown)}; there are {', '.join(there)}")
    outcomes = []
    for name in wanted:
        outcomes.append(run(name, steps[name]))
        if options.long:
            keep(outcomes[-1])
    print(table(outcomes))
    return 0 if all(o.ok for o in outcomes) else 1


def commands(workers: int) -> dict[str, list[str]]:
    """The command of each step, in order; a pytest step is one whose command names pytest."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q"]
    alone, spread = ["-p", "no:xdist"], ["-n", str(workers), "--dist", "worksteal"]
    return {
        "style": [python, "-m", "ruff", "check", "--output-format", "concise", "."],
        "format": [python, "-m", "ruff", "format", "--check", "--output-format", "concise", "."],
        "types": [python, "-m", "mypy", "--no-error-summary"],
        "tests": [*pytest, *spread, "-m", "not long and not serial"],
        "serial": [*pytest, *alone, "-m", "serial and not long"],
        "long": [*pytest, *spread, "-m", "long and not hours and not serial", "--timeout", "3600"],
        "hours": [*pytest, *spread, "-m", "long and hours", "--timeout", "3600"],
        "long-serial": [*pytest, *alone, "-m", "long and serial", "--timeout", "3600"],
    }


def run(name: str, command: Sequence[str]) -> Outcome:
    print(f"== {name}: {' '.join(command[1:])}", flush=True)
    started = time.monotonic()
    if "pytest" not in command:
        code = subprocess.run(command, cwd=ROOT).returncode
        return Outcome(name, code == 0, time.monotonic() - started)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, env=environment()).returncode
        outcome = Outcome(name, code in (0, NO_TESTS), time.monotonic() - started)
        if report.exists():
            read_report(report.read_text(encoding="utf8"), outcome)
    return outcome


def environment() -> dict[str, str]:
    """Where Python is told to keep no bytecode, it does so all the same: tests start some hundred commands, each of which would
    compile weft anew."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def read_report(xml: str, outcome: Outcome) -> None:
    """Takes counts, skips and durations from pytest's JUnit report (our own subprocess wrote it)."""
    timed: list[tuple[float, str]] = []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        outcome.tests += 1
        timed.append((float(case.get("time", "0")), f"{case.get('classname', '')}::{case.get('name', '')}"))
        for skipped in case.findall("skipped"):
            if skipped.get("type") != "pytest.xfail":
                outcome.skips[skipped.get("message") or "no reason given"] += 1
    outcome.slowest = sorted(timed, reverse=True)[:5]


def table(outcomes: Sequence[Outcome]) -> str:
    """What ran, the slowest tests, and every skip with its reason and count."""
    lines = ["", f"{'step':<12}{'result':<10}{'seconds':>8}{'tests':>8}{'skipped':>9}"]
    for o in outcomes:
        counts = f"{o.tests:>8}{sum(o.skips.values()):>9}" if o.tests else ""
        lines.append(f"{o.name:<12}{'ok' if o.ok else 'FAILED':<10}{o.seconds:>8.1f}{counts}")
    slow = sorted((entry for o in outcomes for entry in o.slowest), reverse=True)[:5]
    lines += ["", *(f"slow: {seconds:6.1f} s  {test}" for seconds, test in slow if seconds >= 1)]
    skips = sum((o.skips for o in outcomes), Counter[str]())
    lines += [f"{'skips':<7}reason", *(f"{count:<7}{reason}" for reason, count in skips.most_common())]
    if not skips:
        lines.append("0      nothing was skipped")
    return "\n".join(lines)


def keep(outcome: Outcome) -> None:
    """Write down how a step of the long tests went, beside the last runs of the others."""
    from importlib.metadata import version

    kept = json.loads(LONG_RESULT.read_text(encoding="utf8")) if LONG_RESULT.exists() else {}
    kept[outcome.name] = {
        "passed": outcome.ok,
        "tests": outcome.tests,
        "skips": dict(outcome.skips),
        "seconds": round(outcome.seconds, 1),
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "cores": cpu_count().cores,
        "python": platform.python_version(),
        "torch": version("torch"),
    }
    LONG_RESULT.parent.mkdir(parents=True, exist_ok=True)
    LONG_RESULT.write_text(json.dumps({name: kept[name] for name in LONG if name in kept}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
