"""What each approximate technique does to answers: `weft fidelity` on the bundled model and on that model grown.

    python -m bench.fidelity [--json] [--only kv.store=int8]

Texts are the novels that the bundled model was not trained on, where the shared data lies beside the checkout; else weft's own
prose, of which there is little.  Writes bench/results/fidelity.json; `python -m tools.pages` puts it on the techniques' pages.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.contender import ROOT, Model
from bench.harness import RESULTS, bundled, grown, machine, write

NOVELS = tuple(
    ROOT.parent / "shared" / "data" / "text" / "novels" / f"{name}.txt"
    for name in ("Stevenson_Treasure_1883", "Doyle_Hound_1902")
)
"""Held out of the bundled model's training (tools/tiny/corpus.py)."""
STACKS = (
    "kv.compress=streaming_llm(sinks=4,window=124,every=32)",
    "kv.compress=h2o(heavy=64,recent=64,every=32)",
    "kv.compress=recent(window=128,every=32)",
    "kv.compress=random(chosen=64,recent=64,every=32)",
    "kv.store=int8",
    "attention=flexprefill(gamma=0.9,minimum=128)",
    "skip=mue(after=(7,), threshold=0.965)",
)
GROWN = "smollm2-135m"
ON_GROWN = STACKS[:2] + STACKS[4:6]
"""Leaving early is not measured on the grown model, whose added layers change nothing."""
LENGTHS = {False: (512, 960), True: (512,)}
PASSAGES, QUESTIONS = {False: 8, True: 3}, {False: 24, True: 8}
"""By whether the model was grown.  At 512 tokens the model recalls enough for a recall to count, at 960 it does not."""


def texts(count: int, length: int) -> list[str]:
    """`count` passages, each of one to two windows of `length` tokens; empty where there are no novels."""
    found = [path.read_text(encoding="utf8", errors="replace") for path in NOVELS if path.is_file()]
    return [found[i % len(found)][15_000 * (i + 1) :][: 6 * length] for i in range(count)] if found else []


def measure(only: str, tick: Any, small: bool = False) -> Iterator[dict[str, Any]]:
    """small: the bundled model alone."""
    for model, stacks in ((bundled(), STACKS), *(() if small else ((grown(GROWN), ON_GROWN),))):
        for length, stack in itertools.product(LENGTHS[model.grown], stacks):
            if stack.startswith(only):
                tick(f"{model.name}, {length} tokens, {stack}")
                yield record(model, stack, length)


def record(model: Model, stack: str, length: int) -> dict[str, Any]:
    """`weft fidelity --json` of a stack on a model, with what was asked."""
    big = model.grown
    command = [sys.executable, "-m", "weft", "fidelity", "--with", stack, "--model", str(model.folder), "--json"]
    command += ["--length", str(length), "--questions", str(QUESTIONS[big]), "--threads", "1", "--rounds", "2"]
    with tempfile.TemporaryDirectory(prefix="weft-fidelity-") as place:
        passages = texts(PASSAGES[big], length)
        if passages:
            file = Path(place) / "texts.json"
            file.write_text(json.dumps(passages), encoding="utf8")
            command += ["--prompts", str(file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{stack} on {model.name}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    prose = "novels that the model has not read" if passages else "weft's own prose"
    return {**found, "model": model.name, "with": stack, "questions": QUESTIONS[big], "prose": prose}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the records as JSON")
    parser.add_argument("--only", default="", metavar="STACK", help="those that begin so; writes no file")
    parser.add_argument("--small", action="store_true", help="the bundled model alone")
    flags = parser.parse_args(argv)
    records = list(measure(flags.only, lambda text: print(text, file=sys.stderr), flags.small))
    result = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine(), "records": records}
    if not flags.only:
        write(RESULTS / "fidelity.json", result)
    if flags.json:
        print(json.dumps(result, indent=2))
    else:
        for r in records:
            recall = f"recall {r['recall']} of {r['recall_reference']}"
            print(f"{r['model']:<24} {r['length']:>5} {r['with']:<56} KL {r['kl_mean']:.3g} {recall}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
