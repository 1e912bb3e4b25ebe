"""Requests whose grammar is made ready while the engine runs: on threads of their own, so that no step waits for it.

A request that came with a grammar enters the engine once that is ready; others go on meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from weft.config import Stacks
from weft.errors import ConfigError, EngineError, RequestError
from weft.slots import Constrain
from weft.types import EngineStats, Event, Rejected, RequestSpec

MOST_WAITING = 1024
"""Requests whose grammar may be on its way."""
THREADS = 2


@dataclass(frozen=True, slots=True)
class Ready:
    """What came of a request's grammar: nothing to say, or why there is none; and the seconds that it took."""

    spec: RequestSpec
    error: Exception | None
    seconds: float


class GrammarDesk:
    """stacks: of the engine, asked on its thread.

    done: given every `Ready`, on a thread of the desk; it brings it to the engine's thread, where `entered` goes on with it.
    """

    def __init__(self, stacks: Stacks, done: Callable[[Ready], None]) -> None:
        self._stacks, self._done = stacks, done
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="weft-grammars")
        self._waiting: dict[int, RequestSpec] = {}
        self._gone: set[int] = set()
        """Those of them that nobody waits for any more."""
        self._count, self._seconds = 0, 0.0
        self._changed = False

    def take(self, spec: RequestSpec) -> list[Event]:
        """Begin with a request's grammar, or refuse the request."""
        try:
            if spec.id in self._waiting:
                raise RequestError(f"request id {spec.id} is already live")
            constrain = self._stacks.of(spec.techniques).get("constrain")
        except EngineError as error:
            return [_refused(spec, error)]
        if len(self._waiting) >= MOST_WAITING:
            text = f"the grammars of {MOST_WAITING} requests are being made ready already; try again later"
            return [Rejected(spec.id, text, "capacity", code="overloaded")]
        self._waiting[spec.id] = spec
        self._changed = True
        self._threads.submit(self._make, spec, constrain)
        return []

    def cancel(self, id: int, index: int | None) -> None:
        """Forget a request that has not entered.  One of several outputs has nothing yet that it could be cancelled for."""
        if id in self._waiting and (index is None or self._waiting[id].n == 1):
            self._gone.add(id)

    def entered(self, ready: Ready) -> list[Event] | None:
        """Events that refuse the request; none where it may enter; None where it was cancelled meanwhile."""
        spec = self._waiting.pop(ready.spec.id)
        self._changed = True
        self._count += 1
        self._seconds += ready.seconds
        if spec.id in self._gone:
            self._gone.remove(spec.id)
            return None
        return [] if ready.error is None else [_refused(spec, ready.error)]

    def news(self) -> tuple[int, ...] | None:
        """Ids of the requests whose grammar is on its way; None where they are those told last."""
        if not self._changed:
            return None
        self._changed = False
        return tuple(self._waiting)

    def told(self) -> list[tuple[int, int]]:
        """(id, output) of every output that a client waits for."""
        return [(id, index) for id, spec in self._waiting.items() if id not in self._gone for index in range(spec.n)]

    def counted(self, stats: EngineStats) -> EngineStats:
        """The statistics with what the desk did."""
        return msgspec.structs.replace(stats, grammars=self._count, grammar_s=self._seconds)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _make(self, spec: RequestSpec, constrain: Constrain | None) -> None:
        began, error = time.perf_counter(), None
        try:
            if constrain is not None and spec.grammar is not None:
                constrain.begin(spec.grammar)
        except Exception as found:
            error = found
        self._done(Ready(spec, error, time.perf_counter() - began))


def _refused(spec: RequestSpec, error: Exception) -> Rejected:
    """Of an error that weft did not raise on purpose, no more than its kind."""
    text = str(error) if isinstance(error, EngineError) else f"weft failed on this grammar ({type(error).__name__})"
    if isinstance(error, ConfigError):
        return Rejected(spec.id, text, "request", "weft.with", "unsupported_stack")
    param = getattr(error, "param", None) or "structured_outputs"
    return Rejected(spec.id, text, "request", param, getattr(error, "code", None) or "invalid_grammar")
