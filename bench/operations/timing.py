"""`Bench`: one program whose kernels are timed, beside what the machine can do at that time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any


def cache_bytes() -> int:
    """Of the largest cache, 0 where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(
        (int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes if size[-1:] in "KM" and size), default=0
    )


SPREAD = max(256 << 20, 2 * cache_bytes())
"""Bytes that an operation's weights take together, at least: more than caches hold."""
SECONDS, ROUNDS = 0.3, 3
"""Of one round, at least; rounds, whose median is told."""
KINDS = {"float": 0, "int8": 1, "bfloat16": 2}
"""Numbers that are multiplied, and what `arithmetic` calls them; bfloat16 is float where the instruction set has none.  Whole
numbers of 16 bits, which rows of int8 are multiplied as, are as fast as bfloat16."""
TURNS = 1_000_000
READS, READ_BYTES = 2, 1 << 30
"""Readings of the memory, the faster of which counts, and bytes of each."""

Round = tuple[float, tuple[float, ...]]
"""Seconds of one operation, and the better speeds around them: bytes/s of memory, operations/s by `KINDS`."""


class Bench:
    """module: the extension."""

    def __init__(self, module: Any, threads: int, isa: str) -> None:
        import torch

        from weft.models.memory import host_memory

        self.module, self.program = module, module.Program(threads, isa)
        self.half = "bfloat16" if self.program.isa in ("amx", "avx512_bf16") else "float"
        """What bfloat16 is multiplied as."""
        self._memory = host_memory(READ_BYTES, torch.device("cpu")).fill_(1)

    def step(self, rows: int, *, wanted: int = 0, tokens: int = 0, picked: int = 0) -> Any:
        """Of so many rows, or rows of logits; addresses of tokens and of which rows are picked."""
        step = self.module.Step()
        step.rows(rows, tokens, wanted, picked, 0, 0, 0, 0)
        return step

    def operations(self, first: int, stop: int, step: Any) -> list[Round]:
        """Of operations [first, stop) of the program, which are alike."""
        return self.rounds(self.program.run, first, stop, step, count=stop - first)

    def rounds(self, call: Callable[..., Any], *given: Any, count: int = 1) -> list[Round]:
        """call(*given): does the operation `count` times."""
        found: list[Round] = []
        before = self._speeds()
        call(*given)
        for _ in range(ROUNDS):
            began, turns = time.perf_counter(), 0
            while turns == 0 or time.perf_counter() - began < SECONDS:
                call(*given)
                turns += 1
            seconds = (time.perf_counter() - began) / turns / count
            after = self._speeds()
            found.append((seconds, tuple(map(max, before, after))))
            before = after
        return found

    def record(
        self,
        name: str,
        kernel: str,
        rounds: list[Round],
        moved: float,
        operations: float = 0.0,
        kind: str = "float",
        **more: Any,
    ) -> dict[str, Any]:
        """What is kept of `rounds`.  kernel: the program's method.  moved: bytes read and written; operations: additions and
        multiplications, of numbers of this `kind`."""
        limits = [max(moved / speeds[0], operations / speeds[1 + KINDS[kind]]) for _, speeds in rounds]
        seconds = median(seconds for seconds, _ in rounds)
        return {
            "operation": name, "kernel": kernel, **more, "seconds": seconds, "limit_s": median(limits),
            "fraction": median(limit / taken for limit, (taken, _) in zip(limits, rounds, strict=True)),
            "gb_s": moved / seconds / 1e9, "gop_s": operations / seconds / 1e9,
            "read_gb_s": median(speeds[0] for _, speeds in rounds) / 1e9,
            "limit_gop_s": median(speeds[1 + KINDS[kind]] for _, speeds in rounds) / 1e9,
        }  # fmt: skip

    def _speeds(self) -> tuple[float, ...]:
        """Bytes/s read from memory; additions and multiplications/s in float32, in int8, and in bfloat16."""
        from weft.bench.limit import fastest

        read = fastest(lambda: self.program.read(self._memory.data_ptr(), READ_BYTES), rounds=READS)
        return READ_BYTES / read, *(self._arithmetic(kind) for kind in KINDS.values())

    def _arithmetic(self, kind: int) -> float:
        began = time.perf_counter()
        return float(self.program.arithmetic(TURNS, kind)) / (time.perf_counter() - began)
