"""What works on stored keys and values: attention, dense and of some blocks, what each entry gets of it, and writing them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.operations.timing import SPREAD, Bench

HEADS, KV_HEADS, DIM, BLOCK = 14, 2, 64, 16
CONTEXTS = ((1, 512), (1, 8192), (8, 1024), (8, 8192), (32, 1024))
"""Sequences, and entries of each."""
STORED = {"float32": 0, "bfloat16": 1, "int8": 2}
VISIBLE = 64
"""Entries of a block that rows of a unit see or do not."""


class Laid:
    """Sequences with so many entries each, of which the last `rows` are the step's, in an arena of enough layers."""

    def __init__(self, bench: Bench, kv: str, sequences: int, context: int, rows: int) -> None:
        import torch

        from weft.models.memory import host_memory

        entry = DIM + 4 if kv == "int8" else DIM * getattr(torch, kv).itemsize
        blocks = sequences * context // BLOCK
        self.layer_bytes = 2 * BLOCK * KV_HEADS * entry * blocks
        self.layers = -(-SPREAD // self.layer_bytes) if rows == 1 else 1
        block_bytes = self.layers * self.layer_bytes // blocks
        self.arena = host_memory(blocks * block_bytes, torch.device("cpu")).view(blocks, block_bytes)
        if kv == "int8":
            self.arena.view(-1, entry)[:, :DIM].random_(0, 255)
            self.arena.view(-1, entry)[:, DIM:] = torch.tensor([0.01]).view(torch.uint8)
        else:
            self.arena.view(getattr(torch, kv)).normal_()
        total = sequences * rows
        self.positions = (context - rows + torch.arange(rows)).repeat(sequences)
        self.bounds = torch.arange(sequences + 1) * rows
        self.held = torch.arange(context, dtype=torch.int32).view(-1, BLOCK).repeat(sequences, 1)
        self.tables = torch.arange(blocks).view(sequences, -1)
        self.first, self.lengths = torch.zeros(sequences, dtype=torch.int64), torch.full((sequences,), context)
        self.slots = (torch.arange(sequences)[:, None] * context + context - rows + torch.arange(rows)).flatten()
        self.q, self.out = torch.randn(total, HEADS * DIM), torch.empty(total, HEADS * DIM)
        self.step = bench.module.Step()
        self.step.rows(total, 0, 0, 0, self.positions.data_ptr(), self.bounds.data_ptr(), 0, 0)
        self.step.place(
            0, self.arena.data_ptr(), block_bytes, self.held.data_ptr(), BLOCK, BLOCK, self.tables.data_ptr(),
            self.tables.stride(0), self.first.data_ptr(), self.lengths.data_ptr(), self.slots.data_ptr(), 0, STORED[kv],
        )  # fmt: skip
        self.step.plan(0, list(range(sequences)), 0, 0, HEADS, KV_HEADS, DIM, bench.program.threads)
        self.pairs = sequences * sum(range(context - rows + 1, context + 1))
        self.more: dict[str, Any] = {"kv": kv, "sequences": sequences, "context": context, "rows": rows}

    @property
    def work(self) -> float:
        """Multiplications and additions of all rows over all entries."""
        return 4.0 * self.pairs * HEADS * DIM


def attention(bench: Bench) -> Iterator[dict[str, Any]]:
    """A row of each sequence over its own context, and a chunk of a prompt."""
    for kv in STORED:
        kind = "float" if kv == "float32" else bench.half
        for sequences, context, rows in [(s, c, 1) for s, c in CONTEXTS] + [(1, 1024, 512), (1, 8192, 512)]:
            laid = Laid(bench, kv, sequences, context, rows)
            at = [
                bench.program.attend(
                    0, laid.q.data_ptr(), HEADS * DIM, laid.out.data_ptr(), HEADS * DIM, HEADS, KV_HEADS, DIM, DIM**-0.5, 0.0, i
                )
                for i in range(laid.layers)
            ]  # fmt: skip
            rounds = bench.operations(at[0], at[-1] + 1, laid.step)
            yield bench.record("attention", "attend", rounds, laid.layer_bytes, laid.work, kind, **laid.more)


def entries(bench: Bench) -> Iterator[dict[str, Any]]:
    """Keys and values written; a chunk of a prompt that sees every other block; the attention that each entry gets."""
    import torch

    p = bench.program
    for kv in STORED:
        kind = "float" if kv == "float32" else bench.half
        for sequences, rows in ((1, 1), (32, 1), (1, 512)):
            laid = Laid(bench, kv, sequences, 1024, rows)
            k, v = torch.randn(2, sequences * rows, KV_HEADS * DIM)
            at = [p.store(0, k.data_ptr(), v.data_ptr(), KV_HEADS * DIM, KV_HEADS, DIM, i) for i in range(laid.layers)]
            rounds = bench.operations(at[0], at[-1] + 1, laid.step)
            written = laid.layer_bytes / (sequences * 1024) * sequences * rows
            yield bench.record("store", "store", rounds, k.nbytes + v.nbytes + written, **laid.more)
        laid = Laid(bench, kv, 1, 8192, 512)
        shape = (HEADS, KV_HEADS, DIM, DIM**-0.5, 0.0, 0)
        units = torch.zeros(512, dtype=torch.int64)
        number = laid.step.plan_units(0, [0], units.data_ptr(), HEADS, KV_HEADS)
        visible = torch.zeros(1, KV_HEADS, 8192 // VISIBLE, dtype=torch.uint8)
        visible[:, :, ::2] = 1
        rounds = bench.rounds(
            p.attend_sparse, laid.step, number, 0, visible.data_ptr(), visible.shape[2], VISIBLE, laid.q.data_ptr(), HEADS * DIM,
            laid.out.data_ptr(), HEADS * DIM, *shape,
        )  # fmt: skip
        yield bench.record(
            "attention of blocks",
            "attend_sparse",
            rounds,
            laid.layer_bytes / 2,
            laid.work / 2,
            kind,
            **laid.more,
            seen=0.5,
        )
        laid = Laid(bench, kv, 1, 1024, 512)
        sums, found = torch.zeros(512, dtype=torch.int64), torch.zeros(1, KV_HEADS, 1024, dtype=torch.int64)
        rounds = bench.rounds(
            p.weigh, laid.step, 0, sums.data_ptr(), found.data_ptr(), 1024, laid.q.data_ptr(), HEADS * DIM, *shape
        )
        # Scores are computed twice, for what they sum to and for what each is of that; nothing is mixed.
        yield bench.record("attention by entry", "weigh", rounds, laid.layer_bytes / 2, laid.work, kind, **laid.more)
