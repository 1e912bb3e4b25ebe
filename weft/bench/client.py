"""A small HTTP/1.1 client for load: many streams of server-sent events at once on one event loop.  Standard library only.

Connections are kept and used again, so that a measurement is not one of handshakes.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from urllib.parse import urlsplit

from weft.errors import ConfigError, EngineError

MOST_LINE_BYTES = 16 << 20
MOST_ERROR_BYTES = 64 << 10


class Failed(EngineError):
    """A request that was not answered.  kind: an HTTP status, or what became of the connection."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Target:
    """A server.  url: with or without /v1.  Raises ConfigError for what is no address."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError:  # of a port that is no number, or half an address
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no address of a server; write it as http://127.0.0.1:8000")
        self._host, self._tls = parts.hostname, ssl.create_default_context() if parts.scheme == "https" else None
        self._port = port or (443 if self._tls else 80)
        self.url = url
        self.base = parts.path.rstrip("/").removesuffix("/v1")
        head = [f"Host: {parts.netloc.rpartition('@')[2]}", "User-Agent: weft-bench", "Content-Type: application/json"]
        self._head = "\r\n".join([*head, *([f"Authorization: Bearer {api_key}"] if api_key else [])])
        self._timeout_s = timeout_s
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def get(self, path: str) -> Any:
        """A JSON object.  Raises Failed."""
        body = b"".join([part async for part in self._exchange("GET", path, b"")])
        try:
            return json.loads(body)
        except ValueError:
            raise Failed("answer", f"{path} did not answer with JSON") from None

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[str, None]:
        """What stands behind `data: ` in a stream of events.  Raises Failed."""
        held = b""
        async for part in self._exchange("POST", path, json.dumps(body).encode()):
            *lines, held = (held + part).split(b"\n")
            if len(held) > MOST_LINE_BYTES:
                raise Failed("answer", "a line of the stream does not end")
            for line in lines:
                if line.startswith(b"data: "):
                    yield line[6:].strip().decode("utf8", "replace")

    def close(self) -> None:
        """Close what is kept."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _exchange(self, method: str, path: str, body: bytes) -> AsyncGenerator[bytes, None]:
        """The pieces of the answer's body, once its status is 200."""
        request = f"{method} {self.base}{path} HTTP/1.1\r\n{self._head}\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            async with asyncio.timeout(self._timeout_s):
                reader, writer, status, headers = await self._send(request.encode() + body)
                clean = False
                try:
                    pieces = _body(reader, headers)
                    if status != 200:
                        raise Failed(str(status), _message(await _most(pieces)))
                    async for piece in pieces:
                        yield piece
                    clean = headers.get("connection", "").lower() != "close"
                finally:
                    if clean:
                        self._idle.append((reader, writer))
                    else:
                        writer.close()
        except TimeoutError:
            raise Failed("timeout", f"no end within {self._timeout_s:g} s") from None
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise Failed("connection", str(error) or type(error).__name__) from None

    async def _send(self, request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int, dict[str, str]]:
        """Send on a kept connection, or on a new one where there is none, or where it was closed meanwhile."""
        while True:
            kept = bool(self._idle)
            reader, writer = self._idle.pop() if kept else await self._open()
            try:
                writer.write(request)
                await writer.drain()
                return reader, writer, *await _head(reader)
            except (OSError, EOFError):
                writer.close()
                if not kept:
                    raise

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=1 << 20)


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """(status, headers by lower-case name)."""
    first = (await reader.readuntil(b"\r\n")).split()
    if len(first) < 2 or not first[0].startswith(b"HTTP/") or not first[1].isdigit():
        raise ValueError("the server does not speak HTTP")
    headers: dict[str, str] = {}
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(first[1]), headers


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncGenerator[bytes, None]:
    """The pieces of a body, in chunks, of a length, or up to the end of the connection."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass
        return
    left = int(headers["content-length"]) if "content-length" in headers else None
    while left is None or left > 0:
        piece = await reader.read(64 << 10 if left is None else min(left, 64 << 10))
        if not piece:
            if left:
                raise EOFError("the connection was closed in the midst of an answer")
            return
        left = None if left is None else left - len(piece)
        yield piece


async def _most(pieces: AsyncGenerator[bytes, None]) -> bytes:
    out = b""
    async for piece in pieces:
        out += piece
        if len(out) > MOST_ERROR_BYTES:
            break
    return out


def _message(body: bytes) -> str:
    """What an error in OpenAI's form says."""
    try:
        return str(json.loads(body)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf8", "replace")
