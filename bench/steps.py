"""Whole steps of the engine's kernels: what more rows cost, long contexts beside the memory's limit, and what the host takes.

    python -m bench.steps [--only rows,long,host] [--turns 5] [--json]

rows   a pass of 4 and 8 rows of one sequence behind 128 entries, head included, beside one row, in turns; 0.5B shape
long   8 sequences of 8,192 entries and a row each, beside reading their weights, keys and values at the speed that memory gave
       right before and after; prompts are not computed, the entries are random
host   a decode step of the engine less its kernels (the pass, and draws): one sequence of the 0.5B shape, 32 with top-p, and one
       of the bundled model

Each figure is held to its limit (LIMITS) and told with what was wanted; exit status 1 where one is missed.  Writes
bench/results/steps.json; with `--only` the other figures stay as they were.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from statistics import median
from typing import Any

from bench import limits
from bench.harness import RESULTS, bundled, machine, write

SHAPE, THREADS, CONTEXT = "qwen2.5-0.5b", 2, 128
FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {}, "int8": {"weights": "int8", "activations": "int8"}, "int4": {"weights": "int4", "activations": "int8"},
}  # fmt: skip
ROWS = (1, 4, 8)
LONG = {"batch": 8, "context": 8192}
LIMITS: dict[str, tuple[str, str, float]] = {
    **{f"rows {name}": ("eight", "at most", 1.15) for name in FORMATS},
    "long": ("fraction", "at least", 0.8),
    **{f"host {name}, one": ("share", "at most", 0.05) for name in FORMATS},
    "host int8, 32 with top-p": ("host_ms", "at most", 2.0),
    "host bundled": ("host_ms", "at most", 0.3),
}
"""Of each figure, what is held to which limit, on two cores."""


def built(batch: int, prompt: int, new: int, **options: Any) -> Any:
    """An engine for so many sequences (`weft.bench.decode`), of the shape unless a model is given."""
    from weft.bench.decode import DecodeBench, find_shape, make_room, ready
    from weft.exec.build import EngineConfig

    given = {"load": "random", "model": find_shape(SHAPE), "dtype": "bfloat16", "threads": THREADS, **options}
    return ready(make_room(EngineConfig(**given), DecodeBench(batches=[batch], prompt=prompt, new=new)))[0]


def batch_of(runtime: Any, sequences: int, context: int, rows: int) -> Any:
    """So many rows behind `context` entries of each sequence, the first blocks of the pool being theirs."""
    import torch

    from weft.exec.batch import Batch, GroupBatch

    groups, size = runtime.decoder.groups, runtime.decoder.groups[0].block_tokens
    assert len(groups) == 1, "sequences of a model whose layers all see everything"
    blocks, total = -(-(context + rows) // size), sequences * rows
    tables = torch.arange(sequences * blocks).view(sequences, blocks)
    places = context + torch.arange(rows)
    slots = (tables[:, places // size] * size + places % size).flatten()
    lengths, first = torch.full((sequences,), context + rows), torch.zeros(sequences, dtype=torch.int64)
    tokens = torch.randint(runtime.setup.spec.vocab, (total,))
    bounds = list(range(0, total + 1, rows))
    return Batch(
        tokens, places.repeat(sequences), bounds, [GroupBatch(tables, first, lengths, slots)], torch.arange(total)
    )


def fill(runtime: Any) -> None:
    """The pool, with keys and values that are numbers, at places that count up."""
    import torch

    pool, noise = runtime.pool, torch.randn(1 << 20).bfloat16().view(torch.uint8)
    memory = pool.arena.view(-1)
    for at in range(0, memory.numel(), noise.numel()):
        memory[at : at + noise.numel()] = noise[: memory.numel() - at]
    size = pool.groups[0].block_tokens
    positions = pool.positions(0)
    positions.copy_(torch.arange(positions.numel()).view_as(positions) % (LONG["context"] // size * size))


def timed(runtime: Any, batch: Any) -> float:
    began = time.perf_counter()
    runtime.decoder.forward(batch, runtime.pool)
    return time.perf_counter() - began


def rows(name: str, turns: int) -> dict[str, Any]:
    """Seconds of a pass by rows, in turns, and 4 and 8 rows beside one: medians of the turns' ratios."""
    import torch

    runtime = built(1, CONTEXT, 2 * max(ROWS), **FORMATS[name])
    fill(runtime)
    batches = {some: batch_of(runtime, 1, CONTEXT, some) for some in ROWS}
    found: dict[int, list[float]] = {some: [] for some in ROWS}
    with torch.inference_mode():
        for turn in range(3 * turns + 1):
            for some, batch in batches.items():
                took = median(timed(runtime, batch) for _ in range(5))
                if turn:
                    found[some].append(took)
    four, eight = (median(m / one for m, one in zip(found[some], found[1], strict=True)) for some in ROWS[1:])
    return {"ms": {str(some): 1e3 * median(times) for some, times in found.items()}, "four": four, "eight": eight}


def long(turns: int) -> dict[str, Any]:
    """Milliseconds of a step, and the share of what reading would take: medians over turns of eight steps."""
    import torch

    from weft.bench.limit import read_by, read_gb_s

    runtime = built(LONG["batch"], LONG["context"], 16)
    fill(runtime)
    context = LONG["context"] - 1
    batch = batch_of(runtime, LONG["batch"], context, 1)
    must = read_by(runtime.setup, LONG["batch"], LONG["context"])
    found = []
    with torch.inference_mode():
        before = read_gb_s(THREADS, "cpu")
        for _ in range(2 * turns):
            took = median(timed(runtime, batch) for _ in range(8))
            after = read_gb_s(THREADS, "cpu")
            gb_s = (before + after) / 2
            found.append((1e3 * took, gb_s, must / took / (gb_s * 1e9)))
            before = after
    ms, speeds, shares = zip(*found, strict=True)
    return {
        **LONG, "bytes_per_step": must, "ms": median(ms), "read_gb_s": median(speeds), "fraction": median(shares),
        "spread": [min(shares), max(shares)],
    }  # fmt: skip


@contextmanager
def kernels(seconds: list[float]) -> Iterator[None]:
    """Adds what kernels take, of passes and of draws, while it lasts."""
    from weft.models.native_step import NativeStep
    from weft.ops.cpu.drawing import Drawing

    def watch(method: Any) -> Any:
        def watched(*given: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*given)
            finally:
                seconds[0] += time.perf_counter() - began

        return watched

    run, draw = NativeStep.run, Drawing.draw
    NativeStep.run, Drawing.draw = watch(run), watch(draw)  # type: ignore[method-assign]
    try:
        yield
    finally:
        NativeStep.run, Drawing.draw = run, draw  # type: ignore[method-assign]


def host(batch: int, turns: int, *, temperature: float = 0.0, top_p: float = 1.0, **options: Any) -> dict[str, Any]:
    """Milliseconds of a decode step, of what it leaves beside its kernels, and that share of it: medians."""
    from weft.bench.decode import DecodeBench
    from weft.exec import thread
    from weft.types import RequestSpec, TokenItem, Tokens

    new = 12 * turns
    wanted = DecodeBench(batches=[batch], prompt=CONTEXT, new=new, temperature=temperature, top_p=top_p)
    runtime, ids, spent = built(batch, CONTEXT, new, **options), count(1), [0.0]
    engine = runtime.engine
    for i in range(batch):
        items, id = (TokenItem(tuple((7 * i + j) % 1000 for j in range(CONTEXT))),), next(ids)
        engine.add(RequestSpec(id=id, items=items, sampling=wanted.sampling, seed=id), time.monotonic())
    steps = []
    with kernels(spent):
        while engine.has_work:
            before, began = spent[0], time.perf_counter()
            events, _ = thread.step(engine, runtime.executor)
            took, there = time.perf_counter() - began, spent[0] - before
            if sum(isinstance(event, Tokens) for event in events) == batch:
                steps.append((took, took - there))
    steps = steps[len(steps) // 4 :]
    return {
        "batch": batch, "temperature": temperature, "top_p": top_p, "step_ms": 1e3 * median(took for took, _ in steps),
        "host_ms": 1e3 * median(rest for _, rest in steps), "share": median(rest / took for took, rest in steps),
    }  # fmt: skip


def judged(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The same figure with its limit, and whether it keeps it."""
    key, how, limit = LIMITS[name]
    return limits.judged(name, found, {key: (how, limit)})


def measured(name: str, turns: int) -> dict[str, Any]:
    kind, _, of = name.partition(" ")
    if kind == "rows":
        return rows(of, turns)
    if kind == "long":
        return long(turns)
    if of == "bundled":
        return host(1, turns, load="auto", model=bundled().folder, dtype="auto", threads=None)
    form, _, who = of.partition(", ")
    return (
        host(1, turns, **FORMATS[form])
        if who == "one"
        else host(32, turns, temperature=0.8, top_p=0.95, **FORMATS[form])
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="rows,long,host", metavar="NAMES", help="which figures, e.g. rows,host")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="how often; medians are told")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")
    flags = parser.parse_args(argv)
    kinds = flags.only.split(",")
    if flags.turns < 1 or set(kinds) - {name.partition(" ")[0] for name in LIMITS}:
        parser.error("--turns is at least 1, and --only names rows, long or host, with commas between them")
    path = RESULTS / "steps.json"
    kept = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
    now = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine()}
    for name in LIMITS:
        if name.partition(" ")[0] in kinds:
            kept[name] = {**judged(name, measured(name, flags.turns)), **now}
    kept = {name: kept[name] for name in LIMITS if name in kept}
    write(path, kept)
    if flags.json:
        print(json.dumps(kept, indent=2))
    return 0 if all(found["met"] for found in kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
