"""Adapters that come and go while an engine runs in its thread: commands in, one event out for each.

Files are read on a thread of their own, so that no step waits for them; what was read enters between two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from weft.errors import CapacityError, EngineError, RequestError
from weft.exec.adapters import Adapter, AdapterBook
from weft.types import Adapted, Drop, Event, Load

MOST_WAITING = 16
"""Folders that may wait to be read."""


@dataclass(frozen=True, slots=True)
class Read:
    """What came of reading a folder."""

    command: Load
    found: Adapter | Exception


class AdapterDesk:
    """book: of the engine.  root: the folder below which a Load may read, None for none at all.

    done: given every `Read`, on the reading thread; it brings it to the engine's thread, where `take` goes on with it.
    """

    def __init__(self, book: AdapterBook, root: str | None, done: Callable[[Read], None]) -> None:
        self._book, self._root, self._done = book, root, done
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="weft-adapters")
        self._waiting = 0

    def take(self, command: Load | Drop | Read) -> list[Event]:
        """Carry a command out, or begin to.  Whatever goes wrong is told and changes nothing."""
        try:
            if isinstance(command, Load):
                self._begin(command)
                return []
            if isinstance(command, Drop):
                self._book.drop(command.name)
                return [Adapted(command.id, command.name)]
            self._waiting -= 1
            if isinstance(command.found, Exception):
                raise command.found
            return [self._book.enter(command.found).told(command.command.id)]
        except Exception as error:
            return [_failed(command.command if isinstance(command, Read) else command, error)]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, command: Load) -> None:
        if self._root is None:
            raise RequestError(
                "this server loads no adapters: start it with --lora-root and the folder that they stand in",
                code="forbidden",
            )
        if self._waiting >= MOST_WAITING:
            raise CapacityError(f"{self._waiting} adapters are being loaded already; try again later")
        self._waiting += 1
        self._threads.submit(self._read, command)

    def _read(self, command: Load) -> None:
        found: Adapter | Exception
        try:
            found = self._book.read(command.name, command.path, root=self._root, technique=command.technique)
        except Exception as error:
            found = error
        self._done(Read(command, found))


def _failed(command: Load | Drop, error: Exception) -> Adapted:
    """The event of a command that failed; of an error that weft did not raise on purpose, no more than its kind."""
    text = str(error) if isinstance(error, EngineError) else f"weft failed on this adapter ({type(error).__name__})"
    code = getattr(error, "code", None) or (None if isinstance(error, CapacityError) else "invalid_adapter")
    kind: Literal["request", "capacity"] = "capacity" if isinstance(error, CapacityError) else "request"
    return Adapted(command.id, command.name, error=text, kind=kind, param=getattr(error, "param", None), code=code)
