"""Limits and stacks: what an engine is built from once the flags are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.compose import Verdict, complete, require
from weft.errors import ConfigError
from weft.registry import Part, parse


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a step and of a request.

    max_model_len  positions that a context may reach
    max_num_seqs   sequences that hold KV at once
    max_rows       rows of one step over all sequences (the token budget)
    max_samples    rows of one step whose logits are computed
    max_guesses    draft tokens verified for one sequence in a step
    row_bytes, sample_bytes, work_bytes   workspace for one row, one row of logits, and in all (0: unbounded)
    max_waiting    requests that may wait; one more is refused
    """

    max_model_len: int
    max_num_seqs: int = 64
    max_rows: int = 512
    max_samples: int = 64
    max_guesses: int = 16
    row_bytes: int = 0
    sample_bytes: int = 0
    work_bytes: int = 0
    max_waiting: int = 100_000

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_rows", "max_samples", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_guesses", "row_bytes", "sample_bytes", "work_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if 0 < self.work_bytes < self.row_bytes + self.sample_bytes:
            raise ConfigError(
                f"work_bytes ({self.work_bytes}) must hold one row ({self.row_bytes}) and one row of logits "
                f"({self.sample_bytes}), or nothing could ever run"
            )


@dataclass(frozen=True, slots=True)
class Stack:
    """A complete, composed stack: one instance for each filled slot."""

    parts: tuple[Part, ...]
    instances: Mapping[str, Any] = field(repr=False)
    verdict: Verdict = field(repr=False)

    def __getitem__(self, slot: str) -> Any:
        return self.instances[slot]

    def get(self, slot: str) -> Any | None:
        return self.instances.get(slot)


def build_stack(techniques: Sequence[str | Part] = ()) -> Stack:
    """Parse, complete with nulls, compose and build.  Raises ConfigError or ComposeError."""
    parts = complete([parse(t) if isinstance(t, str) else t for t in techniques])
    verdict = require(parts)
    return Stack(tuple(parts), {p.slot: p.build() for p in parts}, verdict)
