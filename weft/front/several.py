"""`Several`: the engines of several models, as whatever stands before the application sees them."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError
from typing import Protocol

from weft.errors import EngineError
from weft.front.health import states_of
from weft.front.port import EngineInfo, EnginePort, EngineState


class Watched(EnginePort, Protocol):
    """An engine that is looked after."""

    started: Future[EngineInfo]

    def state(self, stall_s: float) -> EngineState: ...


class Several:
    """ports: by their models.  `started` is done once all are up, or with the error of the first that cannot be built."""

    def __init__(self, ports: Mapping[str, Watched]) -> None:
        self._ports = dict(ports)
        self.started: Future[None] = Future()
        self._missing = set(self._ports)
        for name, port in self._ports.items():
            port.started.add_done_callback(lambda done, name=name: self._up(name, done))  # type: ignore[misc]

    def state(self, stall_s: float) -> EngineState:
        return states_of(self._ports, stall_s)

    def error(self) -> str | None:
        """Why the last of them stopped for good: while one lives, its model is served."""
        errors = [port.error() for port in self._ports.values()]
        return None if None in errors else errors[-1]

    def _up(self, name: str, done: Future[EngineInfo]) -> None:
        error = done.exception()
        self._missing.discard(name)
        try:
            if error is not None:
                self.started.set_exception(_of(name, error))
            elif not self._missing:
                self.started.set_result(None)
        except InvalidStateError:  # another one has failed
            pass


def _of(name: str, error: BaseException) -> BaseException:
    """The same error, which says whose it is."""
    return type(error)(f"{name}: {error}") if isinstance(error, EngineError) else error
