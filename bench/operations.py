"""Each operation of the kernels by itself, beside what this machine can do: products of every format and row count, attention,
and what stands between them.

    python -m bench.operations [--json] [--threads 2] [--isa auto] [--only product]

An operation runs over so many different weights, or keys and values, that no cache holds them, and they are read from memory as
in a step.  `limit_s` is the longer of two times: bytes over the bandwidth, and multiplications and additions over the arithmetic
in registers, by the same threads, both measured before and after each round of each operation, since a shared machine's speed
moves.  `fraction` is the median over the rounds.  Writes bench/results/operations.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from bench.harness import RESULTS, machine, write

SPREAD = 256 << 20
"""Bytes that an operation's weights take together, at least."""
SECONDS, ROUNDS = 0.3, 3
"""Of one round, at least; rounds, whose median is told."""
SHAPES = {"qkv": (1152, 896), "gate_up": (9728, 896), "down": (896, 4864)}
"""Outputs and inputs of the products of a layer of Qwen2.5-0.5B; the head's is that of `gate_up` many times over."""
FORMATS = ("float32", "bfloat16", "int8", "int8:32", "int4:32", "int4:128:zero")
ROWS = (1, 2, 4, 8, 16, 32, 64, 512)
KINDS = {"float": 0, "int8": 1, "bfloat16": 2}
"""Numbers that are multiplied, and what `arithmetic` calls them; bfloat16 is float where the instruction set has none.  Whole
numbers of 16 bits, which rows of int8 are multiplied as, are as fast as bfloat16."""
HEADS, KV_HEADS, DIM, BLOCK = 14, 2, 64, 16
CONTEXTS = ((1, 512), (1, 8192), (8, 1024), (8, 8192), (32, 1024))
"""Sequences, and entries of each."""
TURNS = 1_000_000
READS, READ_BYTES = 2, 256 << 20
"""Readings of the memory, the faster of which counts, and bytes of each: far more than a cache holds."""


class Bench:
    """One program whose operations are timed, beside what the machine can do at that time."""

    def __init__(self, module: Any, threads: int, isa: str) -> None:
        import torch

        self.module, self.program = module, module.Program(threads, isa)
        self._memory = torch.ones(READ_BYTES, dtype=torch.uint8)

    def _speeds(self) -> tuple[float, ...]:
        """Bytes/s read from memory; additions and multiplications/s in float32, in int8, and in bfloat16."""
        from weft.bench.limit import fastest

        read = fastest(lambda: self.program.read(self._memory.data_ptr(), READ_BYTES), rounds=READS)
        return READ_BYTES / read, *(self._arithmetic(kind) for kind in KINDS.values())

    def _arithmetic(self, kind: int) -> float:
        began = time.perf_counter()
        return float(self.program.arithmetic(TURNS, kind)) / (time.perf_counter() - began)

    def rounds(self, first: int, stop: int, step: Any) -> list[tuple[float, tuple[float, ...]]]:
        """Of each round: seconds of one of the operations [first, stop), which are alike, and the better speeds around it."""
        found: list[tuple[float, tuple[float, ...]]] = []
        before = self._speeds()
        self.program.run(first, stop, step)
        for _ in range(ROUNDS):
            began, turns = time.perf_counter(), 0
            while turns == 0 or time.perf_counter() - began < SECONDS:
                self.program.run(first, stop, step)
                turns += 1
            seconds = (time.perf_counter() - began) / turns / (stop - first)
            after = self._speeds()
            found.append((seconds, tuple(map(max, before, after))))
            before = after
        return found

    def record(
        self,
        name: str,
        rounds: list[tuple[float, tuple[float, ...]]],
        read: float,
        operations: float,
        kind: str,
        **more: Any,
    ) -> dict[str, Any]:
        """What is kept of `rounds`.  read: bytes; operations: additions and multiplications, of numbers of this `kind`."""
        limits = [max(read / speeds[0], operations / speeds[1 + KINDS[kind]]) for _, speeds in rounds]
        seconds = median(seconds for seconds, _ in rounds)
        return {
            "operation": name, **more, "seconds": seconds, "limit_s": median(limits),
            "fraction": median(limit / taken for limit, (taken, _) in zip(limits, rounds, strict=True)),
            "gb_s": read / seconds / 1e9, "gop_s": operations / seconds / 1e9,
            "read_gb_s": median(speeds[0] for _, speeds in rounds) / 1e9,
            "limit_gop_s": median(speeds[1 + KINDS[kind]] for _, speeds in rounds) / 1e9,
        }  # fmt: skip


def products(bench: Bench) -> Iterator[dict[str, Any]]:
    """One row to a long prompt, in each format; with inputs of 8 bits where that has a kernel."""
    import torch

    from weft.models.formats import WeightFormat
    from weft.models.kernels import INPUTS
    from weft.models.layout import PANEL, panel_bytes
    from weft.ops.cpu.panels import Panels

    for name, (outs, width) in SHAPES.items():
        weight = torch.randn(outs, width) / width**0.5
        x, out = torch.randn(max(ROWS), width), torch.empty(max(ROWS), outs)
        for text in FORMATS:
            whole = text.startswith("int")
            format: Any = WeightFormat.parse(text) if whole else getattr(torch, text)
            size = outs // PANEL * panel_bytes(width, format if whole else format.itemsize)
            copies = -(-SPREAD // size)
            memory = torch.empty(copies, size, dtype=torch.uint8)
            panels = [Panels(m, (outs, width), format, bench.program, bench.module) for m in memory]
            panels[0].pack(weight)
            memory[1:] = memory[0]
            half = "bfloat16" if bench.program.isa == "avx512_bf16" and text != "float32" else "float"
            for kind in (half, "int8") if whole else (half,):
                for rows in ROWS:
                    step = bench.module.Step()
                    step.rows(rows, 0, 0, 0, 0, 0, 0, 0)
                    some = panels if rows < 64 else panels[:4]
                    at = [
                        bench.program.linear(
                            p.weight,
                            x.data_ptr(),
                            x.stride(0),
                            0,
                            out.data_ptr(),
                            out.stride(0),
                            False,
                            INPUTS["float32" if kind == "float" else kind],
                        )
                        for p in some
                    ]
                    rounds = bench.rounds(at[0], at[-1] + 1, step)
                    yield bench.record(
                        "product", rounds, size, 2.0 * rows * outs * width, kind, shape=name, weights=text,
                        activations=kind, rows=rows,
                    )  # fmt: skip


def attention(bench: Bench) -> Iterator[dict[str, Any]]:
    """A row of each sequence over its own context, and a chunk of a prompt."""
    import torch

    from weft.exec.kvpool import host_memory

    for kv in ("float32", "bfloat16", "int8"):
        entry = DIM + 4 if kv == "int8" else DIM * getattr(torch, kv).itemsize
        cases = [(s, c, 1) for s, c in CONTEXTS] + [(1, 1024, 512), (1, 8192, 512)]
        for sequences, context, rows in cases:
            blocks = sequences * context // BLOCK
            layer = 2 * BLOCK * KV_HEADS * entry
            layers = -(-SPREAD // (blocks * layer)) if rows == 1 else 1
            arena = host_memory(blocks * layers * layer, torch.device("cpu")).view(blocks, layers * layer)
            if kv == "int8":
                arena.view(-1, entry)[:, :DIM].random_(0, 255)
                arena.view(-1, entry)[:, DIM:] = torch.tensor([0.01]).view(torch.uint8)
            else:
                arena.view(getattr(torch, kv)).normal_()
            step = bench.module.Step()
            total = sequences * rows
            positions = (context - rows + torch.arange(rows)).repeat(sequences)
            bounds = torch.arange(sequences + 1) * rows
            held = torch.arange(context, dtype=torch.int32).view(-1, BLOCK).repeat(sequences, 1)
            tables = torch.arange(blocks).view(sequences, -1)
            first, lengths, slots = (
                torch.zeros(sequences, dtype=torch.int64),
                torch.full((sequences,), context),
                torch.full((total,), -1),
            )
            q, out = torch.randn(total, HEADS * DIM), torch.empty(total, HEADS * DIM)
            step.rows(total, 0, 0, 0, positions.data_ptr(), bounds.data_ptr(), 0, 0)
            step.place(
                0, arena.data_ptr(), arena.stride(0), held.data_ptr(), BLOCK, BLOCK, tables.data_ptr(), tables.stride(0),
                first.data_ptr(), lengths.data_ptr(), slots.data_ptr(), 0, {"float32": 0, "bfloat16": 1, "int8": 2}[kv],
            )  # fmt: skip
            step.plan(0, list(range(sequences)), 0, 0, HEADS, KV_HEADS, DIM, bench.program.threads)
            at = [
                bench.program.attend(
                    0, q.data_ptr(), q.stride(0), out.data_ptr(), out.stride(0), HEADS, KV_HEADS, DIM, DIM**-0.5, 0.0, i
                )
                for i in range(layers)
            ]
            rounds = bench.rounds(at[0], at[-1] + 1, step)
            pairs = sequences * sum(range(context - rows + 1, context + 1))
            kind = "bfloat16" if bench.program.isa == "avx512_bf16" and kv != "float32" else "float"
            yield bench.record(
                "attention", rounds, blocks * layer, 4.0 * pairs * HEADS * DIM, kind, kv=kv, sequences=sequences,
                context=context, rows=rows,
            )  # fmt: skip


def between(bench: Bench) -> Iterator[dict[str, Any]]:
    """What works on the stream itself, whose rows lie in a cache: its limit is of memory, which it may pass."""
    import torch

    width, inner = 896, 4864
    x, y, wide, narrow = (torch.randn(512, n) for n in (width, width, 2 * inner, inner))
    weight, cos = torch.ones(width), torch.ones(512, DIM // 2)
    p = bench.program
    made: dict[str, tuple[Callable[[], int], int]] = {
        "norm": (
            lambda: p.norm(x.data_ptr(), width, weight.data_ptr(), y.data_ptr(), width, 1, width, 1e-6, False),
            8 * width,
        ),
        "add": (lambda: p.add(x.data_ptr(), y.data_ptr(), width, width), 12 * width),
        "rope": (lambda: p.rope(x.data_ptr(), width, HEADS, DIM, DIM // 2, 0), 8 * width),
        "gated": (lambda: p.gated(wide.data_ptr(), 2 * inner, narrow.data_ptr(), inner, inner, 0), 12 * inner),
    }
    for name, (make, row_bytes) in made.items():
        at = make()
        for rows in (1, 32, 512):
            step = bench.module.Step()
            step.rows(rows, 0, 0, 0, 0, 0, 0, 0)
            step.angles(0, cos.data_ptr(), cos.data_ptr())
            rounds = bench.rounds(at, at + 1, step)
            yield bench.record(name, rounds, rows * row_bytes, 0.0, "float", rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--only", choices=("product", "attention", "between"))
    parser.add_argument("--json", action="store_true", help="print the record, and write no file")
    options = parser.parse_args()
    from weft import native

    module = native.module()
    if module is None:
        sys.exit("weft's kernels are not built here; see CONTRIBUTING.md")
    bench = Bench(module, options.threads, options.isa)
    parts = {"product": products, "attention": attention, "between": between}
    found = []
    for name, part in parts.items():
        if options.only in (None, name):
            for record in part(bench):
                found.append(record)
                if not options.json:
                    said = " ".join(f"{v}" for k, v in record.items() if not isinstance(v, float))
                    print(
                        f"{said:<42} {record['seconds'] * 1e6:10.1f} us  {record['gb_s']:6.1f} GB/s  "
                        f"{record['gop_s']:7.1f} Gop/s  {record['fraction']:5.2f} of the limit",
                        flush=True,
                    )
    told = {
        "benchmark": "operations", "machine": machine(), "threads": options.threads, "isa": bench.program.isa,
        "read_gb_s": median(r["read_gb_s"] for r in found), "results": found,
    }  # fmt: skip
    if options.json:
        print(json.dumps(told))
    elif options.only is None:
        write(RESULTS / "operations.json", told)


if __name__ == "__main__":
    main()
