"""What stands before the application: the page, an answer while the engine is being loaded, and none for who comes at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from weft.front.access import Access
from weft.front.admission import KEY
from weft.front.generation import Refused
from weft.front.guard import form_of, framed_twice
from weft.front.health import health, states_of
from weft.front.openai.services import Services
from weft.front.page import is_page, serve_page
from weft.front.port import EngineState

log = logging.getLogger("weft.front")

WATCHED = ("/health", "/ready")
ENDLESS = "/v1/weft/live"
"""Whoever watches is not waited for at the end."""


def who(scope: Scope) -> str:
    """Whom a rate is counted for where there are no keys: the address.  With keys, `guard.Key` knows better."""
    client = scope.get("client")
    return str(client[0]) if client else ""


class Gate:
    """An ASGI application around one that comes later.

    started: done when `make` can make the application; its exception becomes `failed`.  state: of the engine.  dead: whether the
    engine has ended for good, and the server with it.
    """

    def __init__(
        self,
        started: Future[Any],
        make: Callable[[], Starlette],
        state: Callable[[], EngineState],
        dead: Callable[[], bool] = lambda: False,
    ) -> None:
        self._started, self._make, self._state, self.dead = started, make, state, dead
        self.app: Starlette | None = None
        self.page: ASGIApp = serve_page
        """The page, whatever the state of the application."""
        self.access = Access()
        """Tells of each request."""
        self.failed: BaseException | None = None
        self.draining = False
        self.open = 0
        """Requests that are being answered."""

    @classmethod
    def over(cls, app: Starlette) -> Gate:
        """Before an application that is there."""
        started: Future[None] = Future()
        started.set_result(None)
        services: Services = app.state.services
        return cls(started, lambda: app, lambda: states_of(services.ports, float("inf")))

    def cut(self) -> None:
        """Fail every answer that is not at its end."""
        if self.app is None:
            return
        services: Services = self.app.state.services
        for service in services:
            try:
                service.client.close()
            except Exception:
                log.exception("open requests could not be told that the server ends")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self.access(self._answer, scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and (error := framed_twice(scope)):
            await form_of(scope["path"]).response(error, {"connection": "close"})(scope, receive, send)
            return
        if scope["type"] == "http" and is_page(scope["path"]):
            await self.page(scope, receive, send)
            return
        if scope["type"] == "http" and (app is None or self.draining):
            if scope["path"] in WATCHED:
                await health(self._state(), draining=self.draining)(scope, receive, send)
                return
            if app is None:
                refused = Refused("the model is being loaded; ask again", code="loading")
                await form_of(scope["path"]).response(refused)(scope, receive, send)
                return
            if scope["method"] != "GET":
                refused = Refused("the server is shutting down; ask another one, or later", code="draining")
                await form_of(scope["path"]).response(refused)(scope, receive, send)
                return
        assert app is not None
        if scope["type"] == "http":
            KEY.set(who(scope))
        counted = scope.get("path") != ENDLESS
        self.open += counted
        try:
            await app(scope, receive, send)
        finally:
            self.open -= counted

    async def _live(self, receive: Receive, send: Send) -> None:
        """The application's own beginning and end, as soon as it is there."""
        await receive()
        async with contextlib.AsyncExitStack() as stack:
            ready = self._started.done() and await self._attach(stack)
            await send({"type": "lifespan.startup.complete"})
            end = asyncio.ensure_future(receive())
            if not ready:
                started = asyncio.ensure_future(self._begun())
                await asyncio.wait({end, started}, return_when=asyncio.FIRST_COMPLETED)
                if started.done() and not end.done():
                    await self._attach(stack)
                started.cancel()
            await end
        await send({"type": "lifespan.shutdown.complete"})

    async def _begun(self) -> None:
        """Wait for the engine, however that ends."""
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def tell(_: Future[Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed in the meantime
                loop.call_soon_threadsafe(begun.set)

        self._started.add_done_callback(tell)
        await begun.wait()

    async def _attach(self, stack: contextlib.AsyncExitStack) -> bool:
        try:
            self._started.result()
            app = self._make()
            await stack.enter_async_context(app.router.lifespan_context(app))
            self.app, self.page = app, getattr(app.state, "page", self.page)
        except BaseException as error:
            self.failed = error
        return True
