"""What a step did for requests that keep a timeline, and what it was made of, for those who watch; only on demand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from weft.core.pool import BlockPool
from weft.core.request import Request
from weft.types import Noted, Plan, Seen

MOST_BLOCKS = 16384
"""Blocks of a pool that are shown one by one."""


def planned(requests: Sequence[Request], plan: Plan, target: str) -> list[Noted]:
    """Of those that keep one: that they entered, and which rows of their prompts the plan computes.  requests: by work."""
    entered = {enter.request: enter for enter in plan.enter}
    notes: list[Noted] = []
    for r, work in zip(requests, plan.works, strict=True):
        if not r.spec.timeline or r.leader is not None or work.model != target:
            continue
        enter = entered.get(r.rid)
        if enter is not None and enter.source < 0:
            what = "resumed" if r.preemptions else "started"
            notes.append(Noted(r.id, r.index, what, {"cached_tokens": r.computed[0], "sequences": len(plan.works)}))
        start, stop = work.rows[0]
        if start < r.prompt and not r.output:
            notes.append(Noted(r.id, r.index, "chunk", {"start": start, "stop": min(stop, r.prompt)}))
    return notes


def seen(plan: Plan, target: str, requests: Iterable[Request], pool: BlockPool | None) -> Seen:
    """What a plan is made of, and who holds the pool's blocks."""
    prompt = decode = guesses = 0
    for work in plan.works:
        if work.model == target:
            if work.output:
                decode += len(work.tokens) - work.guesses
            else:
                prompt += len(work.tokens)
            guesses += work.guesses
    if pool is None:
        return Seen(plan.step, prompt, decode, guesses, len(plan.works))
    keys, refs = pool.keys[:MOST_BLOCKS], pool.refs
    blocks = {block: (block, 0, 0) for block, key in enumerate(keys) if key is not None and not refs[block]}
    for r in requests:
        for table in r.tables:
            for block in table.blocks:
                if block < MOST_BLOCKS:
                    blocks[block] = (block, refs[block], r.id)
    return Seen(plan.step, prompt, decode, guesses, len(plan.works), tuple(blocks.values()))
