"""Row 40: ten thousand connections, half-closed ones, ones that send a byte at a time or nothing, and streams that break off."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from tests.security.conftest import KEY, STREAM, Attacked
from weft.front.connection import Patience
from weft.front.gate import Gate
from weft.front.port import EngineState
from weft.front.server import Server

AT_ONCE = 500
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that makes close() a reset."""


def opened(place: Any) -> socket.socket:
    return socket.create_connection((place.hostname, place.port), timeout=30)


def head(length: int = 0, path: str = "/v1/completions") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nx-api-key: {KEY}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def test_ten_thousand_connections(server: Attacked) -> None:
    """Open, and closed in three ways: in good order, by a reset, and after half a request."""
    place = urlsplit(server.url)
    with server.attacked():
        for number in range(10_000):
            with opened(place) as sock:
                if number % 3 == 1:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                elif number % 3 == 2:
                    sock.sendall(b"POST /v1/completions HTT")


def test_many_that_say_nothing_or_little(server: Attacked) -> None:
    """Held at once: silent, half-closed, in the midst of a head, and in the midst of a body."""
    place = urlsplit(server.url)
    held = []
    try:
        with server.attacked():
            for number in range(AT_ONCE):
                sock = opened(place)
                held.append(sock)
                match number % 4:
                    case 1:
                        sock.shutdown(socket.SHUT_WR)
                    case 2:
                        sock.sendall(b"GET /v1/models HTTP/1.1\r\nX: ")
                    case 3:
                        sock.sendall(head(1000) + b'{"prompt": ')
            for _ in range(5):
                for sock in held[2::4]:
                    with contextlib.suppress(OSError):
                        sock.sendall(b"a")
                time.sleep(0.1)
                assert server.http.get("/v1/models").status_code == 200
    finally:
        for sock in held:
            sock.close()


def test_streams_that_break_off(server: Attacked) -> None:
    """By a reset, some before the first token, some after: the engine forgets them all."""
    place = urlsplit(server.url)
    body = json.dumps(STREAM).encode()
    with server.attacked():
        for number in range(60):
            sock = opened(place)
            sock.sendall(head(len(body)) + body)
            if number % 2:
                sock.recv(512)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            sock.close()
        until = time.monotonic() + 20
        while running(server) > 1:  # the one that is watched
            assert time.monotonic() < until, "what nobody reads is still computed"
            time.sleep(0.1)


def running(server: Attacked) -> float:
    page = server.http.get("/metrics").text
    (line,) = [line for line in page.splitlines() if line.startswith("weft:requests_running")]
    return float(line.rpartition(" ")[2])


# ---------------------------------------------------------------------------------------------- with less patience


@pytest.fixture(scope="module")
def impatient() -> Iterator[tuple[str, int]]:
    """A server that waits for nothing longer than half a second, with room for eight."""

    async def endless() -> Any:
        while True:
            yield b"x" * (1 << 16)
            await asyncio.sleep(0)

    app = Starlette(
        routes=[
            Route("/quick", lambda request: PlainTextResponse("well")),
            Route("/endless", lambda request: StreamingResponse(endless())),
        ]
    )
    app.state.services = [SimpleNamespace(client=SimpleNamespace(close=lambda: None))]
    started: Future[None] = Future()
    started.set_result(None)
    ready = threading.Event()
    patience = Patience(most=8, head_s=0.5, rest_s=0.5, reader_s=0.5)
    gate = Gate(started, lambda: app, EngineState)
    made = Server(gate, "127.0.0.1", 0, lambda _: ready.set(), patience=patience, drain_s=0.1)
    thread = threading.Thread(target=made.run)
    thread.start()
    assert ready.wait(20)
    yield "127.0.0.1", int(made.url.rpartition(":")[2])
    made.stop()
    thread.join(20)


def ended_s(sock: socket.socket, drip: bytes = b"", limit: float = 5.0) -> float:
    """Seconds until the server hangs up, while `drip` is sent every 50 ms."""
    began = time.monotonic()
    sock.settimeout(0.05)
    while time.monotonic() - began < limit:
        try:
            if drip:
                sock.sendall(drip)
            if sock.recv(1 << 16) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - began


QUICK = b"GET /quick HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "drip"),
    [
        (b"", b""),
        (b"GET /qu", b""),
        (b"GET /quick HTTP/1.1\r\nX: ", b"a"),
        (b"", b"\r\n"),
        (QUICK, b""),
        (QUICK + b"G", b"E"),
    ],
    ids=["silent", "half a line", "drop by drop", "empty lines", "at rest", "drop by drop after one"],
)
def test_who_takes_too_long_is_hung_up_on(impatient: tuple[str, int], sent: bytes, drip: bytes) -> None:
    with socket.create_connection(impatient) as sock:
        sock.sendall(sent)
        assert ended_s(sock, drip) < 3.0


def test_nobody_is_hung_up_on_too_soon(impatient: tuple[str, int]) -> None:
    with socket.create_connection(impatient) as sock:
        time.sleep(0.3)
        sock.sendall(QUICK[:20])
        time.sleep(0.1)
        sock.sendall(QUICK[20:])
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")


def test_who_does_not_read_is_hung_up_on(impatient: tuple[str, int]) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(impatient)
        sock.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(2.0)
        total = 0
        with contextlib.suppress(OSError):
            while total < 64 << 20 and (got := sock.recv(1 << 20)):
                total += len(got)
        assert total < 64 << 20, "it went on for ever"


def test_the_idle_give_way(impatient: tuple[str, int]) -> None:
    """Beyond eight the oldest idle one goes, at once, and requests are answered; where all are busy the newest is told."""
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(impatient)) for _ in range(8)]
        time.sleep(0.05)
        one = stack.enter_context(socket.create_connection(impatient))
        one.sendall(QUICK)
        assert one.recv(4096).startswith(b"HTTP/1.1 200")
        assert ended_s(idle[0]) < 0.2
    time.sleep(0.1)
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            busy = stack.enter_context(socket.create_connection(impatient))
            busy.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert busy.recv(64).startswith(b"HTTP/1.1 200")
        late = stack.enter_context(socket.create_connection(impatient))
        assert late.recv(4096).startswith(b"HTTP/1.1 503")
