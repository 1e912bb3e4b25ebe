"""What the front sees of an engine: a place to send commands and a stream of frames.  No torch, no shared objects.

The engine is a thread of the same process (`exec.thread.EngineThread`, for `weft.LLM`) or a process of its own, with a journal
and somebody who starts it again (`front.remote.RemoteEngine`, for `weft serve`): nothing but msgspec structs crosses the border.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from weft.types import Adapted, Command, EngineFrame, EngineStats

FrameSink = Callable[[EngineFrame], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the front must know of the engine's model and limits."""

    model_id: str
    vocab_size: int
    max_model_len: int
    kv_blocks: int
    block_tokens: int
    max_num_seqs: int
    dtype: str = "float32"
    device: str = "cpu"
    plan: dict[str, Any] | None = None
    """The memory plan as `weft plan --json` prints it."""
    stack: tuple[str, ...] = ()
    """The techniques in use, as slot=name(args)."""
    adapters: tuple[Adapted, ...] = ()
    """Adapters that were loaded before the first request."""
    loads_adapters: bool = False
    """Whether adapters may be loaded and dropped while it runs."""


STOPPED = "the engine has stopped for good; the server's log says why"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """How an engine is.  reason: why it is not ok, in the front's own words: it is told without a key, and an engine's may name
    folders.  pid: of its process.  last_step_s: since the last step, None before one.

    engines: how each one is, where there are several; model: which one it has, where they are of several models.
    """

    status: Literal["ok", "loading", "stalled"] = "ok"
    reason: str | None = None
    pid: int | None = None
    restarts: int = 0
    last_step_s: float | None = None
    engines: tuple[EngineState, ...] = ()
    model: str | None = None


class EnginePort(Protocol):
    """An engine as the front talks to it.  `send` is thread-safe and never blocks; the sink is called on the engine's thread."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def stats(self) -> EngineStats:
        """The latest snapshot."""

    def send(self, command: Command) -> None: ...

    def subscribe(self, sink: FrameSink) -> None:
        """Give every later frame to `sink` (one sink at a time; None-safe replacement)."""

    def stalled_s(self) -> float:
        """Seconds since the engine last finished a step while it has work; 0.0 when it is idle or advancing."""

    def error(self) -> str | None:
        """Why the engine stopped for good, or None while it lives."""

    def close(self) -> None: ...
