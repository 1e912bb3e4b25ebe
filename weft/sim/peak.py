"""What a device could do at best for conversations over one long context: four limits, and which of them a session meets.

After Fu, Challenges in Deploying Long-Context Transformers, arXiv:2405.08944 (001-36).  A user brings a context, asks questions
and reads the answers; others are served meanwhile, so contexts that memory does not hold go below it and come back.

    users      (memory - weights) / KV of a context, rounded down
    prefill_s  (2 P T + pairs F) / FLOPs, pairs = T (T + 1) / 2, or those within a window
    decode_s   (weights + KV of a context) / bandwidth, for each token of one user's answer
    switch_s   KV of a context / bandwidth of the link to the host, out and in

P: parameters that a row meets, without the head's.  T: tokens of the context.  F: FLOPs of a pair.  Everything at the maker's
peaks: no efficiency, no latency, no workspace.  What a method keeps of KV is a share on one of four axes (layers, heads,
tokens, bits), and shares multiply.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from weft.errors import ConfigError
from weft.slots.cost import Figures, Hardware, Kind

AXES = ("layers", "heads", "tokens", "bits")
QUESTIONS = 5
"""Of a session; a switch before each but the first, where more users than memory holds are there."""
ANSWER = 250
"""Tokens of an answer."""


@dataclass(frozen=True, slots=True)
class Peak:
    """Of one context: bytes of its KV, the limits, the time that the device spends on a session, and what takes most of it."""

    context: int
    kv_bytes: float
    users: int
    prefill_s: float
    decode_s: float
    switch_s: float
    session_s: float
    bound_by: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def peak(
    device: Hardware, model: Figures, context: int, kept: Mapping[str, float] | None = None, dtype: str = "bfloat16"
) -> Peak:
    """The limits of one context length.  kept: the share of KV that stays, by axis.  Raises ConfigError."""
    if context < 1:
        raise ConfigError(f"a context has at least 1 token, got {context}")
    if dtype not in device.flops:
        raise ConfigError(f"{device.name} says nothing of products in {dtype}; it has: {', '.join(device.flops)}")
    share = math.prod((kept or {}).values())
    kv = share * sum(k.entry_bytes * (context if k.window is None else min(context, k.window)) for k in model.kinds)
    flops = 2.0 * model.active_params * context + sum(k.pair_flops * _pairs(context, k) for k in model.kinds)
    room = device.memory_bytes * device.devices - model.stored_bytes
    prefill_s = flops / (device.flops[dtype] * device.devices)
    read = model.read_bytes(1) + model.head_params * model.weight_bytes
    decode_s = (read + kv) / (device.memory_bytes_s * device.devices)
    switch_s = 2.0 * kv / device.host_link.bytes_s
    spent = {"prefill": prefill_s, "decode": QUESTIONS * ANSWER * decode_s, "switch": (QUESTIONS - 1) * switch_s}
    users = max(0, int(room // kv))
    bound = max(spent, key=lambda name: spent[name]) if users else "memory"
    return Peak(context, kv, users, prefill_s, decode_s, switch_s, sum(spent.values()), bound)


def _pairs(context: int, kind: Kind) -> float:
    """Of queries with what each sees, itself included."""
    seen = context if kind.window is None else min(context, kind.window)
    return seen * (seen + 1) / 2 + (context - seen) * seen


def contexts(text: str) -> list[int]:
    """'4096,51200' as lengths.  Raises ConfigError."""
    words = [w.strip() for w in text.split(",")]
    if not all(w.isascii() and w.isdigit() and 0 < len(w) < 10 and int(w) for w in words):
        raise ConfigError(
            f"--peak takes lengths of contexts with commas between them, as in 4096,51200; got {text[:80]!r}"
        )
    return [int(w) for w in words]


def shares(text: str | None) -> dict[str, float]:
    """'layers=0.5,bits=0.25' by axis.  Raises ConfigError."""
    found: dict[str, float] = {}
    for part in text.split(",") if text else ():
        axis, _, value = (x.strip() for x in part.partition("="))
        try:
            share = float(value)
        except ValueError:
            share = 0.0
        if axis not in AXES or axis in found or not 0 < share <= 1:
            raise ConfigError(
                f"--kv-kept takes shares above 0 and at most 1, of {', '.join(AXES)}, as in layers=0.5,bits=0.25; "
                f"got {part[:60]!r}"
            )
        found[axis] = share
    return found
