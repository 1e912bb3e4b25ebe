"""A plain HTTP/1.1 client on asyncio streams, as a soak needs one: it can read slowly, and leave in the middle."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

MAX_LINE_BYTES = 4 << 20
TIMEOUT_S = 300.0
"""Of a whole answer; whoever waits longer has lost it."""


class Lost(Exception):
    """A request that was not answered."""


@dataclass(slots=True)
class Answer:
    """By sequence: its text, its tokens (where they are told) and why it ended; and the usage, cached tokens left out."""

    text: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[str]] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)

    def take(self, chunk: dict[str, Any]) -> None:
        """A chunk of a stream, or a whole answer.  Raises Lost for an error."""
        if chunk.get("error"):
            raise Lost(str(chunk["error"].get("message")))
        usage = chunk.get("usage")
        if usage:
            self.usage = {name: n for name, n in usage.items() if isinstance(n, int)}
        for choice in chunk.get("choices") or ():
            at = choice["index"]
            said = choice.get("delta") or choice.get("message") or choice
            self.text[at] = self.text.get(at, "") + (said.get("text") or said.get("content") or "")
            told = choice.get("logprobs") or {}
            tokens = told.get("tokens") or [one["token"] for one in told.get("content") or ()]
            self.tokens.setdefault(at, []).extend(tokens)
            if choice.get("finish_reason"):
                self.ends[at] = choice["finish_reason"]

    def wrong(self, right: Answer) -> int:
        """Tokens in which it differs from what it should be; of sequences without tokens, one where anything differs."""
        count = 0
        for at in right.text.keys() | self.text.keys():
            mine, theirs = self.tokens.get(at, []), right.tokens.get(at, [])
            same = sum(a == b for a, b in zip(mine, theirs, strict=False))
            count += max(len(mine), len(theirs)) - same
            count += mine == theirs and self.text.get(at) != right.text.get(at)
        return count or int((self.ends, self.usage) != (right.ends, right.usage))


async def ask(
    port: int,
    route: str,
    body: dict[str, Any],
    *,
    pause_s: float = 0.0,
    leave_after: int | None = None,
    into: Answer | None = None,
) -> Answer | None:
    """The answer of 127.0.0.1:port.  pause_s: after each line that is read.  leave_after: lines after which the client hangs up,
    and there is no answer.  into: takes the chunks as they come.  Raises Lost.
    """
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await _ask(port, route, body, pause_s, leave_after, into or Answer())
    except (OSError, TimeoutError, EOFError, ValueError) as error:
        raise Lost(f"{type(error).__name__}: {error}") from None


async def _ask(
    port: int, route: str, body: dict[str, Any], pause_s: float, leave_after: int | None, answer: Answer
) -> Answer | None:
    data = json.dumps(body).encode()
    limit = 4096 if pause_s else MAX_LINE_BYTES
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=max(limit, 1 << 16))
    try:
        head = f"POST {route} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        headers = {}
        while line := (await reader.readline()).strip().lower():
            name, _, value = line.partition(b":")
            headers[name] = value.strip()
        lines = 0
        if status != 200 or b"chunked" not in headers.get(b"transfer-encoding", b""):
            whole = json.loads(await reader.readexactly(int(headers[b"content-length"])))
            if status != 200:
                raise Lost(f"{status}: {whole}")
            answer.take(whole)
            return answer
        async for event in _events(reader):
            lines += 1
            if leave_after is not None and lines > leave_after:
                return None
            if event == b"[DONE]":
                return answer
            answer.take(json.loads(event))
            if pause_s:
                await asyncio.sleep(pause_s)
        raise Lost("the stream ended without saying so")
    finally:
        writer.close()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of server-sent events out of a chunked body."""
    held = b""
    while size := int(await reader.readline(), 16):
        held += await reader.readexactly(size)
        await reader.readline()
        *whole, held = held.split(b"\n\n")
        for event in whole:
            yield event.removeprefix(b"data: ")


async def get(port: int, route: str) -> bytes:
    """The body that GET gives, whatever its status.  Raises Lost."""
    return (await send(port, "GET", route))[1]


async def send(
    port: int, method: str, route: str, data: bytes = b"", kind: str = "application/json"
) -> tuple[int, bytes]:
    """(status, body) of one request whose answer is no stream.  kind: its content type.  Raises Lost."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            head = f"{method} {route} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
            body = f"Content-Type: {kind}\r\nContent-Length: {len(data)}\r\n" if method != "GET" else ""
            writer.write(f"{head}{body}\r\n".encode() + data)
            await writer.drain()
            top, _, answer = (await asyncio.wait_for(reader.read(), TIMEOUT_S)).partition(b"\r\n\r\n")
            return int(top.split(b" ", 2)[1]), answer
        finally:
            writer.close()
    except (OSError, TimeoutError, IndexError, ValueError) as error:
        raise Lost(f"{route}: {type(error).__name__}: {error}") from None
