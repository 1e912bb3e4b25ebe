"""Serving an ASGI application: bind first, say when it is ready, stop cleanly on SIGTERM and SIGINT."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from weft.errors import ConfigError

MAX_HEADER_BYTES = 64 << 10
BACKLOG = 2048
DRAIN_S = 5
"""How long open requests may go on after SIGTERM."""


def bind(host: str, port: int) -> socket.socket:
    """A listening-ready socket on host:port (port 0: any free one).  Raises ConfigError in one sentence."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError, OverflowError) as error:
        raise ConfigError(
            f"cannot resolve host {host!r} ({error}); give an address of this machine with --host"
        ) from None
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)  # here and not later, as only listening shows that somebody else already listens
    except (OSError, OverflowError) as error:
        sock.close()
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise ConfigError(f"port {port} on {host} is taken; choose another one with --port") from None
        if number == errno.EACCES:
            raise ConfigError(
                f"port {port} needs rights that you do not have; choose one above 1023 with --port"
            ) from None
        raise ConfigError(f"cannot listen on {host}:{port} ({error}); choose others with --host and --port") from None
    sock.setblocking(False)
    return sock


def url_of(host: str, sock: socket.socket) -> str:
    """The address to print, with the port that was really bound."""
    return f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"


class Server:
    """One HTTP server over one application.  `run` blocks until `stop` or a signal."""

    def __init__(
        self, app: Any, host: str = "127.0.0.1", port: int = 8000, ready: Callable[[str], None] | None = None
    ) -> None:
        self._sock = bind(host, port)
        self.url = url_of(host, self._sock)
        config = uvicorn.Config(
            app,
            http="h11",  # unlike httptools, it bounds the bytes of a request's head
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=65,
            timeout_graceful_shutdown=DRAIN_S,
        )
        self._server = _Uvicorn(config, lambda: ready(self.url) if ready is not None else None)

    def run(self) -> None:
        """Serve.  Raises ConfigError when the application does not start."""
        try:
            with _quiet_signals():
                self._server.run(sockets=[self._sock])
        except SystemExit:
            raise ConfigError("the HTTP application did not start; the log says why") from None
        finally:
            self._sock.close()

    def stop(self) -> None:
        """Ask a running server to end; safe from any thread."""
        self._server.should_exit = True


def serve(app: Any, host: str, port: int, ready: Callable[[str], None] | None = None) -> None:
    """Serve `app` on host:port until SIGTERM or SIGINT.

    ready: called once with http://HOST:PORT when requests are accepted.  Raises ConfigError when it cannot bind.
    """
    Server(app, host, port, ready).run()


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


@contextlib.contextmanager
def _quiet_signals() -> Iterator[None]:
    """uvicorn raises the signals that it caught again once it has shut down; here they have done their work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
