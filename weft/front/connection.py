"""Connections that are not used well: how many there are, how long a request's head may take, who never reads an answer.

uvicorn bounds a head's bytes, and how long a connection rests between two requests.  It waits for ever for a first request, and
for one that comes byte by byte (slowloris), and it has no bound on connections that ask nothing.
"""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

SPARE_FILES = 256
"""Open files that are left for everything but connections."""
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-type: application/json\r\n\r\n"
    b'{"error":{"message":"the server has as many connections as it takes; ask again later",'
    b'"type":"service_unavailable","param":null,"code":"overloaded"}}'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """most: connections at once.  head_s: for the whole head of a request, from its first byte or the connection's beginning.

    rest_s: between two requests.  reader_s: that an answer may wait for its reader.
    """

    most: int = 4096
    head_s: float = 10.0
    rest_s: float = 65.0
    reader_s: float = 300.0

    @property
    def room(self) -> int:
        """Connections that this process has files for."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return self.most if soft == resource.RLIM_INFINITY else max(1, min(self.most, soft - SPARE_FILES))


class Connection(H11Protocol):
    """One connection.  Beyond `room` the one that has been idle longest gives way, and where all are busy the newest."""

    patience: ClassVar[Patience]
    room: ClassVar[int]
    idle: ClassVar[dict[Connection, None]]
    """Connections of this server without a request under way, the oldest first."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._head: asyncio.TimerHandle | None = None
        self._reader: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.room:
            longest = next(iter(self.idle), None)
            if longest is None:
                transport.write(FULL)
                transport.close()
                return
            longest._drop()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.idle.pop(self, None)
        self._unset_keepalive_if_required()
        self._end_head()
        if self._reader is not None:
            self._reader.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and not self._busy:
            self.idle[self] = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reader is None:
            self._reader = self.loop.call_later(self.patience.reader_s, self._drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _look(self) -> None:
        """Something has come, or nothing yet: is a request under way, or is one waited for?"""
        if self.transport.is_closing() or self._busy:
            self.idle.pop(self, None)
            self._end_head()
            return
        self.idle[self] = None
        if self._head is None:
            self._head = self.loop.call_later(self.patience.head_s, self._drop)

    def _end_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _drop(self) -> None:
        self.idle.pop(self, None)
        self.transport.abort()


def connection(patience: Patience) -> type[Connection]:
    """The protocol of one server."""
    own = {"patience": patience, "room": patience.room, "idle": {}}
    return type("Connection", (Connection,), own)
