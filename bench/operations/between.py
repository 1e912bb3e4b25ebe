"""What works on the stream and on logits, whose rows lie in a cache: its limit is of memory, which it may pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.operations.entries import DIM, HEADS
from bench.operations.products import INNER, SILU, WIDTH
from bench.operations.timing import Bench

VOCAB = 151_936
LAWS = {
    "greedy": (0.0, 0, 1.0, 0.0), "0.8": (0.8, 0, 1.0, 0.0), "0.8, top_p 0.95": (0.8, 0, 0.95, 0.0),
    "0.8, top_k 50": (0.8, 50, 1.0, 0.0), "0.8, min_p 0.05": (0.8, 0, 1.0, 0.05),
}  # fmt: skip
"""temperature, top_k, top_p, min_p."""


def between(bench: Bench) -> Iterator[dict[str, Any]]:
    import torch

    x, y, wide, narrow = (torch.randn(512, n) for n in (WIDTH, WIDTH, 2 * INNER, INNER))
    weight, cos, picked = torch.ones(WIDTH), torch.ones(512, DIM // 2), torch.randperm(512)
    tokens, logits = torch.randint(0, VOCAB, (512,)), torch.randn(32, VOCAB)
    table = _table(bench)
    p = bench.program
    made = {
        "norm": (p.norm(x.data_ptr(), WIDTH, weight.data_ptr(), y.data_ptr(), WIDTH, 1, WIDTH, 1e-6, False), 8 * WIDTH),
        "add": (p.add(x.data_ptr(), y.data_ptr(), WIDTH, WIDTH), 12 * WIDTH),
        "rope": (p.rope(x.data_ptr(), WIDTH, HEADS, DIM, DIM // 2, 0), 8 * WIDTH),
        "gated": (p.gated(wide.data_ptr(), 2 * INNER, narrow.data_ptr(), INNER, INNER, SILU), 12 * INNER),
        "embed": (p.embed(table.weight, 1.0, y.data_ptr(), WIDTH), 6 * WIDTH),
        "pick": (p.pick(x.data_ptr(), WIDTH, y.data_ptr(), WIDTH), 8 * WIDTH),
        "softcap": (p.softcap(logits.data_ptr(), VOCAB, 30.0), 8 * VOCAB),
    }
    for name, (at, row_bytes) in made.items():
        for rows in (1, 32) if name == "softcap" else (1, 32, 512):
            step = bench.step(rows, wanted=rows, tokens=tokens.data_ptr(), picked=picked.data_ptr())
            step.angles(0, cos.data_ptr(), cos.data_ptr())
            rounds = bench.operations(at, at + 1, step)
            yield bench.record(name, name, rounds, float(rows * row_bytes), rows=rows)


def _table(bench: Bench) -> Any:
    """An embedding in bfloat16."""
    import torch

    from weft.models.layout import PANEL, panel_bytes
    from weft.ops.cpu.panels import Panels

    memory = torch.zeros(VOCAB // PANEL * panel_bytes(WIDTH, 2), dtype=torch.uint8)
    return Panels(memory, (VOCAB, WIDTH), torch.bfloat16, bench.program, bench.module)


def draws(bench: Bench) -> Iterator[dict[str, Any]]:
    """A token out of each row of logits, whose bytes are counted once."""
    import torch

    logits = 2.5 * torch.randn(32, VOCAB)
    where = [row.data_ptr() for row in logits]
    for name, law in LAWS.items():
        for rows in (1, 8, 32):
            laws = [[value] * rows for value in law]
            rounds = bench.rounds(bench.program.draw, where[:rows], VOCAB, *laws, list(range(rows)))
            yield bench.record("draw", "draw", rounds, 4.0 * rows * VOCAB, law=name, rows=rows)
