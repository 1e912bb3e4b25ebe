"""Serving an ASGI application: bind first, say when it is ready, stop cleanly on SIGTERM and SIGINT."""

from __future__ import annotations

import errno
import math
import socket
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from weft.errors import ConfigError
from weft.front.connection import Patience, connection
from weft.front.gate import Gate
from weft.front.guard import Addressed, Rooted
from weft.front.signals import signals

MAX_HEADER_BYTES = 64 << 10
SWITCH_S = 0.001
"""After which a thread that hears an engine gets Python's lock from a busy event loop: it needs it several times for a frame."""
BACKLOG = 2048
ACCEPTED = 64
"""Connections that are taken at once, before streams have their turn again."""
DRAIN_S = 5.0
"""How long open requests may go on after the first SIGTERM or SIGINT; then, or at the second, they are told that it ends."""
GRACE_S = 3
"""What they have to take that in, before their connections are cut."""


def bind(host: str, port: int) -> socket.socket:
    """A listening-ready socket on host:port (port 0: any free one).  Raises ConfigError in one sentence."""
    if not 0 <= port <= 65535:  # getaddrinfo would take it modulo 65536
        raise ConfigError(f"port {port} does not exist; give --port from 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"cannot resolve host {host!r} ({error}); give an address of this machine with --host"
        ) from None
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)  # here and not later, as only listening shows that somebody else already listens
    except OSError as error:
        sock.close()
        number = error.errno
        if number == errno.EADDRINUSE:
            raise ConfigError(f"port {port} on {host} is taken; choose another one with --port") from None
        if number == errno.EACCES:
            raise ConfigError(
                f"port {port} needs rights that you do not have; choose one above 1023 with --port"
            ) from None
        raise ConfigError(f"cannot listen on {host}:{port} ({error}); choose others with --host and --port") from None
    sock.setblocking(False)
    return sock


def url_of(host: str, sock: socket.socket, scheme: str = "http") -> str:
    """The address to print, with the port that was really bound."""
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"


def check_tls(certificate: Path, key: Path) -> None:
    """Raises ConfigError in one sentence where the two files are no certificate with its key."""
    for flag, path in (("--tls-cert", certificate), ("--tls-key", key)):
        try:
            path.open("rb").close()
        except OSError as error:
            raise ConfigError(f"{flag} {path} cannot be read ({error.strerror or error})") from None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or "they do not belong together, or are no PEM files"
        raise ConfigError(
            f"--tls-cert {certificate} and --tls-key {key} are no certificate and its key, in PEM form and without "
            f"a password ({reason})"
        ) from None


class Server:
    """One HTTP server over one application (see `app.create_app`, and `gate.Gate` for one that comes later).

    `run` blocks until `stop` or a signal.  ready: called once the application is there and requests are taken.

    Binding is done here, so a taken port raises ConfigError before anything else happens; or `sock`, what `bind` gave
    earlier, is taken over.  patience: with connections.  tls: files of a certificate and its key, as `check_tls` took them.
    root_path: what stands before all paths.
    """

    def __init__(
        self,
        app: Starlette | Gate,
        host: str = "127.0.0.1",
        port: int = 8000,
        ready: Callable[[str], None] | None = None,
        *,
        drain_s: float = DRAIN_S,
        sock: socket.socket | None = None,
        patience: Patience | None = None,
        tls: tuple[Path, Path] | None = None,
        root_path: str = "",
    ) -> None:
        self._sock = bind(host, port) if sock is None else sock
        self.url = url_of(host, self._sock, "http" if tls is None else "https")
        patience = patience or Patience()
        self._gate = app if isinstance(app, Gate) else Gate.over(app)
        config = uvicorn.Config(
            Addressed(Rooted(self._gate, root_path) if root_path else self._gate),
            http=connection(patience),  # of h11, which unlike httptools bounds the bytes of a request's head
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            ws="none",
            lifespan="on",
            log_config=None,  # the program's own logging
            access_log=False,  # `access` says more, and no query, in which a key may stand
            server_header=False,
            backlog=ACCEPTED,
            timeout_keep_alive=patience.rest_s,  # type: ignore[arg-type]
            ssl_certfile=None if tls is None else str(tls[0]),
            ssl_keyfile=None if tls is None else str(tls[1]),
            timeout_graceful_shutdown=GRACE_S,
        )
        tell = ready or (lambda _: None)
        self._server = _Uvicorn(config, self._gate, lambda: tell(self.url), drain_s)

    def run(self) -> None:
        """Serve.  Raises ConfigError when the application does not start, or what kept the engine from being built."""
        sys.setswitchinterval(SWITCH_S)
        try:
            # Also before uvicorn takes them itself, and after: one that came in between would be lost.
            with signals(self._server.handle_exit):
                self._server.run(sockets=[self._sock])
        except SystemExit:
            raise ConfigError("the HTTP application did not start; the log says why") from None
        finally:
            self._sock.close()
        if self._gate.failed is not None:
            raise self._gate.failed

    def stop(self) -> None:
        """Ask a running server to end, as a first signal does; safe from any thread."""
        self._server.drain()


def serve(
    app: Starlette | Gate,
    host: str,
    port: int,
    ready: Callable[[str], None] | None = None,
    *,
    drain_s: float = DRAIN_S,
) -> None:
    """Serve `app` on host:port until SIGTERM or SIGINT; open requests then have `drain_s` seconds to end.

    ready: called once with http://HOST:PORT when requests are accepted.  Raises ConfigError when it cannot bind.
    """
    Server(app, host, port, ready, drain_s=drain_s).run()


class _Uvicorn(uvicorn.Server):
    """ready: called when requests are taken.  The first signal begins to drain, which lasts at most `drain_s` seconds."""

    def __init__(self, config: uvicorn.Config, gate: Gate, ready: Callable[[], None], drain_s: float) -> None:
        super().__init__(config)
        self._gate, self._ready, self._drain_s = gate, ready, drain_s
        self._told = False
        self._until = math.inf

    def drain(self) -> None:
        """Take nothing new, and end once what is open has ended."""
        if not self._gate.draining:
            self._until = time.monotonic() + self._drain_s
            self._gate.draining = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gate.draining:
            self.should_exit = True
        self.drain()

    async def on_tick(self, counter: int) -> bool:
        gate = self._gate
        if not self._told and gate.app is not None and not gate.draining:
            self._told = True
            self._ready()
        drained = gate.draining and (not gate.open or time.monotonic() > self._until)
        return drained or gate.failed is not None or gate.dead() or await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(BACKLOG)  # asyncio has just made it as short as what it takes at once

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gate.cut()
        await super().shutdown(sockets)
