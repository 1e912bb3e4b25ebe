"""An engine without a model: an `EnginePort` whose tokens are written down beforehand.

For what a real engine does not do on demand: dying, stalling, refusing, giving up a request, many tokens in a frame.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

from weft.front.port import EngineInfo, FrameSink
from weft.types import (
    Add,
    Cancel,
    Command,
    EngineFrame,
    EngineStats,
    Event,
    Finished,
    Rejected,
    RequestSpec,
    TokenItem,
    TokenLogprob,
    Tokens,
    Watch,
)

Script = Callable[[RequestSpec, int], Sequence[int]]


class _Run:
    """One sequence on its way through its script."""

    def __init__(self, spec: RequestSpec, index: int, tokens: Sequence[int]) -> None:
        self.spec = spec
        self.index = index
        self.tokens = list(tokens)[: spec.sampling.max_tokens]
        self.sent = 0


class ScriptedPort:
    """script(spec, index): the tokens that the sequence would produce; cut by max_tokens and stop ids.

    group: tokens per frame.  interval_s: pause between frames.  vector: what it gives for pooled states.  A
    script that returns fewer tokens than max_tokens and ends with no stop id keeps the sequence waiting for ever.
    """

    def __init__(self, script: Script, info: EngineInfo, *, group: int = 1, interval_s: float = 0.001) -> None:
        self.script = script
        self.group = group
        self.interval_s = interval_s
        self.commands: list[Command] = []
        self.reject: Rejected | None = None
        self.give_up: str | None = None
        self.stall = 0.0
        self.vector = b""
        self._info = info
        self._error: str | None = None
        self._sink: FrameSink | None = None
        self._runs: list[_Run] = []
        self._new: list[RequestSpec] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def stats(self) -> EngineStats:
        with self._lock:
            return EngineStats(
                running=len(self._runs),
                waiting=len(self._new),
                kv_blocks_total=self._info.kv_blocks,
                kv_blocks_referenced=len(self._runs),
            )

    def send(self, command: Command) -> None:
        with self._lock:
            self.commands.append(command)
            if isinstance(command, Add):
                self._new.append(command.spec)
            elif not isinstance(command, Watch):
                self._new = [spec for spec in self._new if spec.id != command.id]
                self._runs = [
                    run for run in self._runs if run.spec.id != command.id or command.index not in (None, run.index)
                ]

    def subscribe(self, sink: FrameSink) -> None:
        self._sink = sink

    def stalled_s(self) -> float:
        return self.stall

    def error(self) -> str | None:
        return self._error

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def die(self, reason: str) -> None:
        """End as an engine that crashed: no frame says so."""
        self._error = reason
        self.close()

    def cancelled(self) -> list[int]:
        return [command.id for command in self.commands if isinstance(command, Cancel)]

    def _loop(self) -> None:
        while not self._closed.wait(self.interval_s):
            with self._lock:
                events = self._admit() + [event for run in list(self._runs) for event in self._advance(run)]
                sink = self._sink
            if events and sink is not None:
                sink(EngineFrame(events=tuple(events)))

    def _admit(self) -> list[Event]:
        events: list[Event] = []
        for spec in self._new:
            if self.reject is not None:
                events.append(
                    Rejected(spec.id, self.reject.message, self.reject.kind, self.reject.param, self.reject.code)
                )
            elif self.give_up is not None:
                events.append(Finished(spec.id, 0, "error", error=self.give_up))
            else:
                self._runs += [_Run(spec, i, self.script(spec, i)) for i in range(spec.n)]
                if spec.sampling.prompt_logprobs >= 0:
                    ids = [i for item in spec.items if isinstance(item, TokenItem) for i in item.ids]
                    told = tuple(self._logprob(spec, token) for token in ids[1:])
                    events.append(Tokens(spec.id, 0, (), prompt_logprobs=told))
        self._new = []
        return events

    def _advance(self, run: _Run) -> list[Event]:
        sampling = run.spec.sampling
        out: list[int] = []
        ended: Finished | None = None
        while len(out) < self.group and run.sent < len(run.tokens) and ended is None:
            token = run.tokens[run.sent]
            run.sent += 1
            out.append(token)
            if token in sampling.stop_ids:
                ended = Finished(run.spec.id, run.index, "stop", stop_id=token, cached_tokens=3)
            elif run.sent == sampling.max_tokens:
                vector = self.vector if sampling.pooling else b""
                ended = Finished(run.spec.id, run.index, "length", cached_tokens=3, vector=vector)
        if not out:
            return []
        logprobs = tuple(self._logprob(run.spec, token) for token in out) if sampling.logprobs >= 0 else ()
        events: list[Event] = [Tokens(run.spec.id, run.index, tuple(out), logprobs)]
        if ended is not None:
            self._runs.remove(run)
            events.append(ended)
        return events

    def _logprob(self, spec: RequestSpec, token: int) -> TokenLogprob:
        count = max(spec.sampling.logprobs, spec.sampling.prompt_logprobs)
        top = tuple(((token + k) % self._info.vocab_size, -1.0 - k) for k in range(count))
        return TokenLogprob(token, -1.0 if token % 2 else -math.inf, 1, top)


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
