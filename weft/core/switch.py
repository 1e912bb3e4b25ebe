"""Sequences that yield their place to others: what of them is stored below the pool, and what may be moved beside a step.

A sequence that yields has its full blocks stored in one instruction, and only those that are not stored yet: what it left there
the last time it yielded stays, so that the second time only what was added is moved.  It comes back as any prefix does.
"""

from __future__ import annotations

from collections.abc import Iterable

from weft.core.kv import KV
from weft.core.request import Request
from weft.types import KVOp, KVOpKind, Plan


def saves(kv: KV, requests: Iterable[Request]) -> list[KVOp]:
    """What stores the full blocks of sequences that are about to lose them, one instruction for each and each group."""
    ops: list[KVOp] = []
    if kv.tiers is None or not kv.share or kv.tiers.offload.place(1) is None:
        return ops
    for request in requests:
        for g in (g for groups in kv.by_model for g in groups if request.publishes):
            table, size = request.tables[g], kv.groups[g].block_tokens
            skipped = table.first // size
            names = kv.names(request, size, table.published)[skipped:]
            ops += kv.tiers.hand_over(g, names, table.blocks[: len(names)])
    return ops


def aside(plan: Plan) -> frozenset[int]:
    """Of the plan's KV instructions, those that may be carried out while its rows are computed: nothing else in it writes what
    a SAVE reads, and whoever waits for a LOAD has no rows in it."""
    kinds = (KVOpKind.SAVE, KVOpKind.LOAD)
    written = {b for grant in plan.grants for b in grant.blocks}
    written.update(b for op in plan.kv for b in (op.target or op.source if op.kind not in kinds else op.target))
    found = set[int]()
    for i, op in enumerate(plan.kv):
        if op.kind is KVOpKind.LOAD or (op.kind is KVOpKind.SAVE and written.isdisjoint(op.source)):
            found.add(i)
    return frozenset(found)
