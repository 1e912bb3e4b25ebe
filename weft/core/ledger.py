"""The memory plan: every arena to the byte, decided before anything is allocated.

    weights     the checkpoint in its stored form, once
    draft       weights, workspace and laws of a second model, where there is one
    kv          blocks * block_bytes (+ the position of every entry)
    tiers       memory below the pool, for blocks that it gives up
    workspace   the decoder's named buffers
    adapters    what is set aside for adapters that come and go
    reserve     interpreter, libraries, allocator slack: measured, not planned

Pure arithmetic: who knows the machine (`exec.host`) and the model (`models`) passes the figures in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from weft.errors import ConfigError
from weft.types import GroupKind, GroupSpec

GIB = 1 << 30
KV_DEFAULT_BYTES = 1 * GIB
"""KV pool when nobody says how much memory weft may use: this, or two full-length sequences if those are larger."""
RESERVE_BYTES = 400 << 20
"""Interpreter, torch and the server beside the arenas; the soak of `tests/test_memory.py` holds it to this + 200 MB."""
DEFAULT_SHARE = 0.85
"""Share of the available memory that a plan may take without --memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """All in bytes, tokens or blocks.  fits: whether one sequence of max_model_len runs within available_bytes."""

    weights_bytes: int
    kv_bytes: int
    kv_blocks: int
    kv_bytes_per_token: int
    workspace_bytes: int
    reserve_bytes: int
    total_bytes: int
    available_bytes: int
    max_model_len: int
    block_tokens: int
    block_bytes: int
    fits: bool
    reason: str = ""
    available_source: str = ""
    model_max_len: int = 0
    draft_bytes: int = 0
    """Weights, workspace and laws of a model beside the target."""
    adapters_bytes: int = 0
    tiers_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def blocks_for(
    groups: Sequence[GroupSpec],
    tokens: int,
    rows: int,
    *,
    layered: bool = False,
    kept: int | None = None,
    ahead: int = 0,
) -> int:
    """Blocks that one sequence of `tokens` positions holds at most, when no step adds more than `rows` to it.

    A window group keeps only what its window and the rows of one step reach; parked hidden states stand only in layered steps.
    kept: entries that a full group of the target keeps at most where compression drops some.  ahead: rows of a step that a model
    beside the target may add to them.
    """
    total = 0
    for g in groups:
        if g.kind is GroupKind.PARKED:
            need = min(tokens, rows) if layered else 0
        elif g.window is not None:
            # The head is dropped in whole blocks, so up to one block more than window and rows ask for.
            need = min(tokens, g.window - 1 + rows + g.block_tokens + (ahead if g.model != "target" else 0))
        else:
            need = tokens if kept is None or g.model != "target" else min(tokens, kept)
        total += -(-need // g.block_tokens)
    return total


def bytes_per_token(groups: Sequence[GroupSpec]) -> int:
    """KV bytes that one more position costs, over the groups that keep one entry for each position."""
    return sum(g.entry_bytes for g in groups if g.kind is not GroupKind.PARKED)


def plan_memory(
    *,
    weights_bytes: int,
    workspace_bytes: int,
    groups: Sequence[GroupSpec],
    block_bytes: int,
    rows: int,
    max_num_seqs: int,
    model_max_len: int,
    available_bytes: int,
    available_source: str = "",
    memory_bytes: int | None = None,
    max_model_len: int | None = None,
    layered: bool = False,
    reserve_bytes: int = RESERVE_BYTES,
    draft_bytes: int = 0,
    ahead: int = 0,
    adapters_bytes: int = 0,
    tiers_bytes: int = 0,
) -> MemoryPlan:
    """Divide the memory.

    memory_bytes: --memory, everything that weft may take; None takes what the default KV pool needs, at most 85 % of
    what is available.  max_model_len: None takes the model's own, or less where only less fits (and says so in `reason`).
    draft_bytes: of a model beside the target, which may add `ahead` rows to a step's.
    """
    _check_length(max_model_len, model_max_len)
    # The int32 position of every entry; any group may hold a block, so as many as the one with most entries has.
    entry_overhead = 4 * max(g.block_tokens for g in groups)
    per_block = block_bytes + entry_overhead
    fixed = weights_bytes + draft_bytes + workspace_bytes + reserve_bytes + adapters_bytes + tiers_bytes
    share = int(available_bytes * DEFAULT_SHARE)
    room = share if memory_bytes is None else min(memory_bytes, available_bytes)
    fit_blocks = max(0, (room - fixed) // per_block)
    reason = "" if memory_bytes is None or memory_bytes <= available_bytes else _too_much(memory_bytes, available_bytes)
    length = max_model_len or _affordable(groups, fit_blocks, rows, model_max_len, layered, ahead)
    need = blocks_for(groups, length, rows, layered=layered, ahead=ahead)
    if max_model_len is None and length < model_max_len:
        reason = f"the model allows {model_max_len} tokens, memory holds the KV of {length}; give more --memory for longer ones"
    most = max_num_seqs * need
    blocks = min(fit_blocks, most)
    if memory_bytes is None:
        blocks = min(blocks, max(KV_DEFAULT_BYTES // per_block, 2 * need))
    total = fixed + blocks * per_block
    fits = blocks >= need >= 1
    if not fits:
        blocks = max(blocks, need)
        total = fixed + blocks * per_block
        bound = _bound(memory_bytes, room, available_bytes)
        aside = {"adapters": adapters_bytes, "tiers below the pool": tiers_bytes}
        reason = _why(
            weights_bytes + draft_bytes, workspace_bytes, reserve_bytes, aside, need * per_block, length, bound
        )
    return MemoryPlan(
        weights_bytes=weights_bytes, kv_bytes=blocks * per_block, kv_blocks=blocks,
        kv_bytes_per_token=bytes_per_token(groups), workspace_bytes=workspace_bytes, reserve_bytes=reserve_bytes,
        total_bytes=total, available_bytes=available_bytes, max_model_len=length, block_tokens=groups[0].block_tokens,
        block_bytes=block_bytes, fits=fits, reason=reason, available_source=available_source, model_max_len=model_max_len,
        draft_bytes=draft_bytes, adapters_bytes=adapters_bytes, tiers_bytes=tiers_bytes,
    )  # fmt: skip


def parted(room: int, needs: Sequence[int], most: Sequence[int]) -> list[int]:
    """`room` bytes among pools: in proportion to what each needs, none more than it may have; what one leaves, the others get.

    Where `room` is at least the sum of the needs, each has at least its own.
    """
    out, left = list(most), set(range(len(needs)))
    while left:
        whole = sum(needs[i] for i in left)
        full = {i for i in left if most[i] * whole <= room * needs[i]}
        if not full:
            for i in left:
                out[i] = room * needs[i] // whole
            break
        room -= sum(most[i] for i in full)
        left -= full
    return out


def _affordable(groups: Sequence[GroupSpec], blocks: int, rows: int, most: int, layered: bool, ahead: int) -> int:
    """The model's own length, or a shorter one that `blocks` hold, unless that would be hardly any."""
    if blocks_for(groups, most, rows, layered=layered, ahead=ahead) <= blocks:
        return most
    shorter = longest(groups, blocks, rows, most, layered=layered, ahead=ahead)
    return shorter if shorter >= min(most, 256) else most


def _check_length(wanted: int | None, most: int) -> None:
    if wanted is not None and wanted < 1:
        raise ConfigError(f"--max-model-len must be at least 1, got {wanted}")
    if wanted is not None and wanted > most:
        raise ConfigError(f"--max-model-len {wanted} exceeds the {most} positions that the model was made for")


def _too_much(asked: int, available: int) -> str:
    return f"--memory asks for {_mib(asked)}, {_mib(available)} are available; planned with those"


def _bound(memory_bytes: int | None, room: int, available_bytes: int) -> str:
    """Which limit the plan ran into, in words."""
    if room >= available_bytes:
        return f"{_mib(available_bytes)} are available"
    if memory_bytes is None:
        return f"weft takes {_mib(room)} of the {_mib(available_bytes)} that are available unless --memory says more"
    return f"--memory allows {_mib(room)}"


def longest(
    groups: Sequence[GroupSpec], blocks: int, rows: int, most: int, *, layered: bool = False, ahead: int = 0
) -> int:
    """The longest sequence that `blocks` hold alone, at most `most` (bisection: the need grows with the length)."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if blocks_for(groups, middle, rows, layered=layered, ahead=ahead) <= blocks:
            low = middle
        else:
            high = middle - 1
    return low


def _mib(n: int) -> str:
    return f"{n / (1 << 20):,.0f} MiB"


def _why(weights: int, workspace: int, reserve: int, aside: dict[str, int], kv: int, length: int, bound: str) -> str:
    more = "".join(f" + {name} {_mib(size)}" for name, size in aside.items() if size)
    total = weights + workspace + reserve + kv + sum(aside.values())
    return (
        f"the model does not fit: weights {_mib(weights)} + workspace {_mib(workspace)} + reserve {_mib(reserve)}{more} + KV of "
        f"one sequence of {length} tokens {_mib(kv)} = {_mib(total)}, but {bound}; "
        "try a smaller --max-model-len, a smaller model or dtype, or more memory"
    )
