"""From a command to its first token, `import weft`, and memory beside the weights and the KV pool.

    python -m bench.startup [--only import,bundled] [--turns 5] [--json]

import    seconds of `import weft` in a fresh Python
bundled   seconds from `weft generate` to the first letter of the answer, with the bundled model; medians of the turns
shape     the same with the 0.5B shape in bfloat16, two threads (a checkpoint of random weights, drawn once into .cache)
memory    the most that was resident (`rss_peak_bytes`, loading included) of a process that decodes a full KV pool of the bundled
          model, less its weights and its pool; `memory_shape` of the 0.5B shape's checkpoint

Each figure is held to its limit (LIMITS); exit status 1 where one is missed.  Writes bench/results/startup.json; with `--only`
the other figures stay as they were.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from bench import limits
from bench.contender import ROOT
from bench.harness import RESULTS, machine, write

SHAPE = "qwen2.5-0.5b"
LIMITS: dict[str, tuple[str, float]] = {
    "import": ("seconds", 0.3), "bundled": ("seconds", 3.0), "shape": ("seconds", 4.0),
    "memory": ("beside_bytes", 400e6), "memory_shape": ("beside_bytes", 400e6),
}  # fmt: skip
"""Of each figure, what is held to which limit, on two cores."""
BATCH, PROMPT, NEW = 16, 128, 32
RESIDENT = """
import json, sys
from itertools import count
from pathlib import Path
from weft.bench.decode import DecodeBench, make_room, phase, ready
from weft.exec.build import EngineConfig
from weft.exec.host import peak_rss_bytes
from weft.hub import resolve
model, options, batch, prompt, new = json.loads(sys.argv[1])
source = Path(model) if model else resolve(None)
bench = DecodeBench(batches=[batch], prompt=prompt, new=new)
setup = make_room(EngineConfig(model=source, **options), bench)
runtime, _ = ready(setup)
phase(runtime, batch, bench, 0, count(1), lambda text: None)
plan = setup.plan
print(json.dumps({"rss_peak_bytes": peak_rss_bytes(), "weights_bytes": plan.weights_bytes, "kv_bytes": plan.kv_bytes}))
"""


def importing(turns: int) -> dict[str, Any]:
    code = "import time; began = time.perf_counter(); import weft; print(time.perf_counter() - began)"
    return _seconds([float(_run("-c", code)) for _ in range(turns)])


def first_token(turns: int, *words: str) -> dict[str, Any]:
    """Of `weft generate WORDS`."""
    return _seconds([one_first_token(*words) for _ in range(turns)])


def one_first_token(*words: str) -> float:
    """Seconds from starting the command to what stdout shows of its only token, the line's end where that has no letters."""
    command = [
        sys.executable,
        "-m",
        "weft",
        "generate",
        *words,
        "--max-tokens",
        "1",
        "--temperature",
        "0",
        "--ignore-eos",
    ]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)
        took = time.perf_counter() - began
        process.stdout.read()
        if not first or process.wait() != 0:
            raise SystemExit(process.stderr.read().decode(errors="replace")[-2000:])
    return took


def shaped() -> str:
    """A folder with a checkpoint of the 0.5B shape."""
    from bench.rivals.checkpoint import drawn
    from weft.bench.decode import find_shape

    return str(drawn(find_shape(SHAPE), ROOT / ".cache" / "rivals" / "weights" / SHAPE, _tell))


def memory(model: str, **options: Any) -> dict[str, Any]:
    """model: a folder; empty for the bundled model."""
    found: dict[str, Any] = json.loads(_run("-c", RESIDENT, json.dumps([model, options, BATCH, PROMPT, NEW])))
    return {**found, "beside_bytes": found["rss_peak_bytes"] - found["weights_bytes"] - found["kv_bytes"]}


def judged(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The same figure with its limit, and whether it keeps it."""
    key, most = LIMITS[name]
    return limits.judged(name, found, {key: ("at most", most)})


def _seconds(times: Sequence[float]) -> dict[str, Any]:
    return {"seconds": median(times), "spread": [min(times), max(times)], "turns": len(times)}


def _run(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    return done.stdout.splitlines()[-1]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(LIMITS), help="figures to take, by commas")
    parser.add_argument("--turns", default=5, type=int, help="times that a command is started")
    parser.add_argument("--json", action="store_true", help="print the record, too")
    options = parser.parse_args(argv)
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "import": lambda: importing(options.turns),
        "bundled": lambda: first_token(options.turns, "The sea was"),
        "shape": lambda: first_token(options.turns, shaped(), "The sea was", "--threads", "2"),
        "memory": lambda: memory("", threads=1),
        "memory_shape": lambda: memory(shaped(), threads=2, dtype="bfloat16"),
    }
    names = options.only.split(",")
    if unknown := set(names) - measures.keys():
        parser.error(f"--only knows {', '.join(measures)}, not {', '.join(sorted(unknown))}")
    if options.turns < 1:
        parser.error("--turns must be at least 1")
    path = RESULTS / "startup.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
    record |= {"benchmark": "startup", "date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine()}
    for name in names:
        record[name] = judged(name, measures[name]())
    write(path, record)
    if options.json:
        print(json.dumps(record, indent=2))
    sys.exit(0 if all(record[name]["met"] for name in names) else 1)


if __name__ == "__main__":
    main()
