"""Row 21: heads, addresses, trailers and chunks without measure are refused before they are held."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.security.conftest import KEY, Attacked

MB = b"a" * (1 << 20)
MOST = 64


def parts(name: str) -> Iterator[bytes]:
    """Up to 64 MB of a request that does not get beyond its head, or beyond a line of its body."""
    start = f"Host: localhost\r\nx-api-key: {KEY}\r\n".encode()
    match name:
        case "one header":
            yield b"GET /v1/models HTTP/1.1\r\n" + start + b"X: "
        case "an address":
            yield b"GET /v1/models?"
        case "many headers":
            yield b"GET /v1/models HTTP/1.1\r\n" + start
        case "a method":
            yield b""
        case "a key":
            yield b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer "
        case _:
            yield (
                b"POST /v1/embeddings HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
                + start
            )
            yield b"\r\n" + {"an extension": b"1;x=", "a chunk's size": b"", "a trailer": b"1\r\n{\r\n0\r\nX: "}[name]
    filler = {"many headers": b"X: y\r\n" * 170_000, "a chunk's size": b"0" * (1 << 20)}.get(name, MB)
    for _ in range(MOST):
        yield filler


NAMES = ["one header", "an address", "many headers", "a method", "a key", "an extension", "a chunk's size", "a trailer"]


@pytest.mark.parametrize("name", NAMES)
def test_they_are_cut_off(server: Attacked, name: str) -> None:
    place = urlsplit(server.url)
    with server.attacked():
        with socket.create_connection((place.hostname, place.port), timeout=30) as sock:
            sent, answer = 0, b""
            try:
                for part in parts(name):
                    sock.sendall(part)
                    sent += len(part)
            except (BrokenPipeError, ConnectionResetError):
                pass
            else:
                pytest.fail("64 MB were taken")
            try:
                answer = sock.recv(4096)
            except ConnectionResetError:
                pass
            assert not answer or answer.startswith(b"HTTP/1.1 4")
            assert sent < 16 << 20  # what the kernel's buffers hold included
