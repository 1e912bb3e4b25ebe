"""One line in the log, and a trace where traces are wanted, for each request; and the id by which both, and its client, know it.

The line has where the request went and what came of it: never a body, a query, a header or a key.  All of it is read when the
request has ended, off what is there anyway, so tokens on their way cost nothing.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from contextvars import ContextVar
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weft.front.generation import Generation, LiveRequest

log = logging.getLogger("weft.access")

ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
"""What a client may send as `x-request-id`, to be known by in the log."""
PROBES = frozenset({"/health", "/ready", "/metrics"})
"""What machines ask every few seconds: a line for each of these only at level debug."""
LEFT = 499
"""Status of a request whose client went away before it was told any, as nginx writes it."""


class Track:
    """A request over HTTP.  began_s, ended_s: on the monotonic clock; wall_ns: since 1970, of the beginning.  known: whether it
    came to a route, so that clients make up no names of traces.  generations: what it asked the engine for, until it ended: work
    that goes on without a client is no part of it."""

    __slots__ = (
        "began_s", "ended_s", "generations", "headers", "id", "known", "method", "model", "path", "route", "status", "wall_ns",
    )  # fmt: skip

    def __init__(self, scope: Scope) -> None:
        self.began_s, self.wall_ns = time.monotonic(), time.time_ns()
        self.ended_s: float | None = None
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        given = next((value for name, value in self.headers if name == b"x-request-id"), b"")
        self.id = given.decode() if ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
        self.method, self.path = str(scope["method"]), str(scope["path"])
        self.route, self.known = "", False
        self.status = LEFT
        self.generations: list[Generation] = []
        self.model = ""

    def add(self, generation: Generation, model: str = "") -> None:
        """model: who answers, where there are several."""
        if self.ended_s is None:
            self.generations.append(generation)
            self.model = model

    def end(self, scope: Scope) -> None:
        self.ended_s = time.monotonic()
        route = self.path
        for name, value in (scope.get("path_params") or {}).items():
            at = route.find(f"/{value}", len("/v1/"))
            route = f"{route[:at]}/{{{name}}}{route[at + 1 + len(value) :]}"
        # A line is one line, whatever a client has put into its address.
        self.route = "".join(c if c.isprintable() else "\ufffd" for c in route[:200])
        self.known = "endpoint" in scope

    @property
    def requests(self) -> list[LiveRequest]:
        return [request for generation in self.generations for request in generation.requests]

    @property
    def first_s(self) -> float | None:
        """When its first token came."""
        return min((s.first_s for r in self.requests for s in r.sequences if s.first_s), default=None)

    def record(self) -> dict[str, Any]:
        """What is told of it once it has ended."""
        assert self.ended_s is not None
        found: dict[str, Any] = {"id": self.id, "method": self.method, "route": self.route, "status": self.status}
        if self.generations:
            first = self.first_s
            found |= {"model": self.model} if self.model else {}
            found |= {
                "prompt_tokens": sum(g.prompt_tokens for g in self.generations),
                "cached_tokens": sum(g.cached_tokens for g in self.generations),
                "completion_tokens": sum(g.completion_tokens for g in self.generations),
                "outcome": self._outcome(),
                "ttft_s": None if first is None else round(first - self.began_s, 6),
            }
        return {**found, "e2e_s": round(self.ended_s - self.began_s, 6)}

    def _outcome(self) -> str:
        if any(g.error is not None for g in self.generations):
            return "error"
        return "abort" if any(g.open for g in self.generations) else "complete"


TRACK: ContextVar[Track | None] = ContextVar("weft-track", default=None)
"""The HTTP request that is being handled."""


class Traces(Protocol):
    """Where traces go, see `tracing`."""

    def tell(self, track: Track) -> None: ...


class Access:
    """Handles a request by handing it on, and tells of it when it has ended.  traces: who else hears of it."""

    def __init__(self, traces: Traces | None = None) -> None:
        self._traces = traces

    async def __call__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        track = Track(scope)
        TRACK.set(track)

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                track.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", track.id.encode())]}
            await send(message)

        try:
            await app(scope, receive, told)
        finally:
            track.end(scope)
            self._tell(track)
            # Timers that were called off, but whose time has not come, still hold it, by the context in which they were set.
            track.generations, track.headers = [], []

    def _tell(self, track: Track) -> None:
        level = logging.DEBUG if track.path in PROBES else logging.INFO
        if log.isEnabledFor(level):
            record = track.record()
            text = " ".join(f"{name}={value}" for name, value in record.items() if value is not None)
            log.log(level, "%s", text, extra={"request": record})
        if self._traces is not None and track.path not in PROBES:
            self._traces.tell(track)
