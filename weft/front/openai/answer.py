"""How an answer leaves: as one JSON body, or as server-sent events.  Either way it ends when the client goes away.

A stream's status is decided by its first token: what goes wrong before it is an ordinary HTTP error, what goes wrong
after it is an event `data: {"error": ...}`.  Every frame of the engine gives at most one write per stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from weft.errors import EngineError
from weft.front.generation import Delta, Generation
from weft.front.openai.errors import error_payload, error_response

log = logging.getLogger("weft.front")

DONE = b"data: [DONE]\n\n"
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Writer(Protocol):
    """What a route makes of deltas."""

    def open(self) -> bytes:
        """Events before the first delta."""

    def events(self, deltas: list[Delta]) -> bytes:
        """Events for some deltas."""

    def close(self, usage: dict[str, Any]) -> bytes:
        """Events after the last delta, `[DONE]` left out."""

    def gather(self, deltas: list[Delta]) -> None:
        """Keep deltas for `body`."""

    def body(self, usage: dict[str, Any]) -> bytes:
        """The whole answer as JSON."""


class Form(Protocol):
    """How an answer says that it failed, and that its stream is over.  done: the stream's last bytes."""

    @property
    def done(self) -> bytes: ...

    def response(self, error: BaseException, headers: dict[str, str] | None = None) -> Response:
        """Before anything was sent."""

    def event(self, error: BaseException) -> bytes:
        """In the midst of a stream."""


class OpenAIForm:
    """OpenAI's."""

    done = DONE

    def response(self, error: BaseException, headers: dict[str, str] | None = None) -> Response:
        return error_response(error, headers)

    def event(self, error: BaseException) -> bytes:
        return b"data: " + msgspec.json.encode(error_payload(error)) + b"\n\n"


OPENAI = OpenAIForm()


class JSONAnswer:
    """An ASGI response that waits for the end of a generation."""

    def __init__(self, generation: Generation, writer: Writer, form: Form = OPENAI) -> None:
        self.generation = generation
        self.writer = writer
        self.form = form

    async def whole(self) -> bytes:
        """The body, once it is there.  Raises EngineError."""
        while deltas := await self.generation.take():
            self.writer.gather(deltas)
        return self.writer.body(usage_of(self.generation))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with until_disconnect(receive, self.generation):
            response: Response
            try:
                response = Response(await self.whole(), media_type="application/json")
            except Exception as error:
                response = self.form.response(logged(error))
            if not self.generation.cancelled:
                await response(scope, receive, send)


class StreamAnswer:
    """An ASGI response that sends each delta as it comes."""

    def __init__(self, generation: Generation, writer: Writer, form: Form = OPENAI) -> None:
        self.generation = generation
        self.writer = writer
        self.form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation, writer = self.generation, self.writer
        async with until_disconnect(receive, generation):
            try:
                deltas = await generation.take()
            except Exception as error:
                await self.form.response(logged(error))(scope, receive, send)
                return
            if generation.cancelled:
                return
            await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
            try:
                out = writer.open()
                while deltas:
                    out += writer.events(deltas)
                    if out:
                        await send({"type": "http.response.body", "body": out, "more_body": True})
                    out = b""
                    deltas = await generation.take()
                out += writer.close(usage_of(generation))
            except Exception as error:
                out = self.form.event(logged(error))
            await send({"type": "http.response.body", "body": out + self.form.done})


def usage_of(generation: Generation) -> dict[str, Any]:
    """OpenAI's usage object."""
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


def logged(error: Exception) -> Exception:
    """The error itself; written to the log where it is not one that weft raises on purpose."""
    if not isinstance(error, EngineError):
        log.error("a request failed", exc_info=error)
    return error


@contextlib.asynccontextmanager
async def until_disconnect(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """Cancel the generation when the client goes away, and in any case at the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        generation.cancel()
