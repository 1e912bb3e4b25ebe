"""A prompt that one engine computes and another goes on with: its full blocks are stored between the two, by name.

The first engine stores them in the plan that computes the prompt's last row, and tells their tickets as the request ends.  The
second takes the tickets with the request, and finds the blocks as it finds any prefix.  What either has lost meanwhile is
computed once more, so nothing depends on the hand-over but time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from weft.core.kv import KV
from weft.core.request import Request
from weft.types import KVOp


def saves(kv: KV, requests: Iterable[Request]) -> list[KVOp]:
    """What stores the prompts of those that are to be handed over, once the plan in the making has computed them."""
    ops: list[KVOp] = []
    for request in requests:
        if kv.tiers is None or not request.spec.hand_over or len(request.context) > request.prompt:
            continue
        for g, names in _names(kv, request):
            table = request.tables[g]
            skipped = table.first // kv.groups[g].block_tokens
            ops += kv.tiers.hand_over(g, names[skipped:], table.blocks[: len(names) - skipped])
    return ops


def tickets(kv: KV, request: Request) -> tuple[tuple[int, ...], ...]:
    """Of a prompt's blocks, by group."""
    told: list[tuple[int, ...]] = [()] * len(kv.groups)
    if kv.tiers is not None and request.spec.hand_over:
        for g, names in _names(kv, request):
            told[g] = kv.tiers.tickets(g, names)
    return tuple(told)


def undo(kv: KV, request: Request) -> None:
    """The plan that was to compute its last row has not: whatever was stored is not its prompt."""
    for ticket in (ticket for group in tickets(kv, request) for ticket in group if ticket):
        kv.lost([ticket])


def take(kv: KV, request: Request) -> None:
    """Another engine has stored blocks of its prompt, and told their tickets."""
    if kv.tiers is not None and request.spec.stored:
        for g, names in _names(kv, request):
            if g < len(request.spec.stored):
                kv.tiers.told(g, names, request.spec.stored[g])


def _names(kv: KV, request: Request) -> Iterator[tuple[int, list[bytes]]]:
    """Of the target's groups: the names of the prompt's full blocks, the last row's left out, which is always computed."""
    if kv.share and request.publishes:
        for g in kv.by_model[0]:
            size = kv.groups[g].block_tokens
            yield g, kv.names(request, size, (request.prompt - 1) // size)
