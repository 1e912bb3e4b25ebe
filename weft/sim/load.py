"""What a plan computes, in the numbers that a cost is told."""

from __future__ import annotations

import itertools

from weft.core import switch
from weft.slots.cost import Figures, Load
from weft.types import KVOpKind, Plan, Work


def load_of(plan: Plan, model: Figures, layers: int, *, aside: bool = False) -> Load:
    """The load of a plan's works on the target model.  aside: blocks below the pool are moved beside the step where they can be.

    A row sees itself and all before it, or as many as its window.  A work of several rows reads its entries once for all of them.
    """
    kinds = model.kinds
    pairs, read, single = [0.0] * len(kinds), [0.0] * len(kinds), [0.0] * len(kinds)
    decode_rows = works = 0
    parted = False
    for work in plan.works:
        if work.model != "target":
            continue
        n = len(work.tokens)
        stop = work.stop
        works += 1
        share = 1.0
        if work.layers is not None:
            parted, share = True, (work.layers[1] - work.layers[0]) / layers
        if n == 1 and not work.soft:
            decode_rows += 1
            for i, kind in enumerate(kinds):
                single[i] += share * (stop if kind.window is None else min(stop, kind.window))
            continue
        for i, kind in enumerate(kinds):
            pairs[i] += share * _seen(work, kind.window)
            read[i] += share * (stop if kind.window is None else min(stop, kind.window + n))
    moved = sum(len(op.source) for op in plan.kv if op.kind is KVOpKind.COPY)
    below = [(i, len(op.argument)) for i, op in enumerate(plan.kv) if op.kind in (KVOpKind.LOAD, KVOpKind.SAVE)]
    free = switch.aside(plan) if aside and below else ()
    return Load(
        rows=plan.rows, samples=plan.samples, works=works, prompt_pairs=pairs, prompt_entries=read, decode_entries=single,
        decode_rows=decode_rows, spans=_spans(plan, layers) if parted else [], moved=moved, stored=sum(n for _, n in below),
        copies=len(below), aside=sum(n for i, n in below if i in free), entered=len(plan.enter),
    )  # fmt: skip


def _spans(plan: Plan, layers: int) -> list[tuple[float, int]]:
    """(share of the layers, rows that pass them): layers between two bounds are passed by the same rows."""
    passed = [(w.layers or (0, layers), w.passing) for w in plan.works if w.model == "target"]
    bounds = sorted({0, layers, *(at for span, _ in passed for at in span)})
    return [
        ((stop - start) / layers, sum(n for (first, last), n in passed if first <= start and stop <= last))
        for start, stop in itertools.pairwise(bounds)
    ]


def _seen(work: Work, window: int | None) -> float:
    """Pairs of a work's rows; of a tree, and of soft tokens, each with what stands before the tree, and its own line."""
    start, stop = work.start, work.stop
    if not work.parents and not work.soft:
        return _pairs(start, stop, window)
    first = stop - work.guesses
    depth: list[int] = []
    for parent in work.parents or range(-1, work.guesses - 1):
        depth.append(0 if parent < 0 else depth[parent] + 1)
    depth += [d + j for d in (-1, *depth) for j in range(1, work.soft + 1)]
    return _pairs(start, first, window) + sum(_pairs(first + d, first + d + 1, window) for d in depth)


def _pairs(start: int, stop: int, window: int | None) -> float:
    """Sum of what the rows [start, stop) see: i + 1 positions each, or the window."""
    if window is None or stop <= window:
        return (stop * (stop + 1) - start * (start + 1)) / 2
    full = max(start, min(stop, window))  # rows before it see everything
    return (full * (full + 1) - start * (start + 1)) / 2 + (stop - full) * window
