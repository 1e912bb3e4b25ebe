"""Responses on their way: one that a client waits for, and those that go on in the background, over the end of a server too."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from weft.errors import CapacityError, EngineError
from weft.front.admission import work_for
from weft.front.generation import EngineStopped, Generation, Prompt
from weft.front.openai.answer import SSE_HEADERS, logged, until_disconnect
from weft.front.openai.errors import error_response, passes
from weft.front.openai.response_object import ResponseObject
from weft.front.openai.service import Service
from weft.front.openai.structs import ChatRequest
from weft.front.store.database import StoreFull
from weft.front.store.responses import ResponseStore, Stored

encode = msgspec.json.encode
MAX_BACKGROUND = 1000
"""Background responses that a server works on at once."""
AGAIN_S = 0.5
"""Pause before a background response that found no room asks once more."""


class ResponseRun:
    """One response from its prompt to its end.

    store: None where it is not to be kept.  row: as it is stored while it is not answered.
    """

    def __init__(
        self,
        service: Service,
        response: ResponseObject,
        request: ChatRequest,
        prompt: Prompt,
        row: Stored,
        store: ResponseStore | None,
    ) -> None:
        self.service, self.response, self.row, self.store = service, response, row, store
        self._request, self._prompt = request, prompt
        self.generation: Generation | None = None
        self.events_so_far: list[bytes] = []
        """Of a background response, for who reads them later."""
        self.ended = asyncio.Event()
        self.dropped = False
        """It was deleted meanwhile, and is not to be written."""
        self._news = asyncio.Event()

    async def start(self) -> Generation:
        """Raises RequestError, EngineStopped."""
        self.generation = await self.service.start(self._request, self._prompt)
        return self.generation

    async def events(self) -> AsyncGenerator[list[bytes], None]:
        """What a stream tells, batch by batch; at the end the response is kept, before its last events.

        Raises EngineError where it fails before the first token.
        """
        generation, response = self.generation, self.response
        assert generation is not None
        deltas = await generation.take()
        yield response.begin()
        try:
            while deltas:
                if events := response.take(deltas):
                    yield events
                deltas = await generation.take()
        except Exception as error:
            if isinstance(error, EngineStopped) and self.row.request is not None:
                raise  # a later server goes on with it
            events = response.fail(logged(error), generation)
            await self.keep()
            yield events
            return
        response.end(generation)
        await self.keep()
        yield response.close()

    async def keep(self) -> None:
        """Write the answered response.  Where there is no room it is answered all the same, and says that it is not stored."""
        if self.store is None or self.dropped:
            return
        row = msgspec.structs.replace(self.row, body=encode(self.response.object()), request=None)
        try:
            await self.store.put(row)
        except StoreFull as error:
            logged(RuntimeError(str(error)))
            self.response.kept = False

    def tell(self, events: list[bytes]) -> None:
        """Put events where `follow` finds them."""
        self.events_so_far += events
        self._news.set()

    def finish(self) -> None:
        self.ended.set()
        self._news.set()

    async def follow(self, after: int) -> AsyncIterator[bytes]:
        """Events whose number is above `after`, those to come too."""
        at = after + 1
        while True:
            if at < len(self.events_so_far):
                out = b"".join(self.events_so_far[at:])
                at = len(self.events_so_far)
                yield out
            elif self.ended.is_set():
                return
            else:
                self._news.clear()
                await self._news.wait()


class ResponseAnswer:
    """An ASGI response over a run that ends with its client."""

    def __init__(self, run: ResponseRun, generation: Generation, *, stream: bool) -> None:
        self.run, self.generation, self.stream = run, generation, stream

    async def whole(self) -> bytes:
        """The body, once it is there.  Raises EngineError."""
        async for _ in self.run.events():
            pass
        return encode(self.run.response.object())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with until_disconnect(receive, self.generation):
            events = self.run.events()
            begun = False
            try:
                async with contextlib.aclosing(events):
                    async for some in events:
                        if self.stream and not begun:
                            await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
                            begun = True
                        if self.stream:
                            await send({"type": "http.response.body", "body": b"".join(some), "more_body": True})
            except Exception as error:
                if begun:
                    logged(error)
                else:
                    await error_response(logged(error))(scope, receive, send)
                    return
            if self.stream:
                await send({"type": "http.response.body", "body": b""})
            elif not self.generation.cancelled:
                await self._send_whole(scope, receive, send)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = self.run.response
        made = response.object()
        status = 500 if response.status == "failed" else 200
        body = made if status == 200 else {"error": {**made["error"], "type": "server_error", "param": None}}
        await Response(encode(body), status, media_type="application/json")(scope, receive, send)


class Followed:
    """An ASGI response with the events of a background response; it goes on when the client goes away."""

    def __init__(self, run: ResponseRun, after: int = -1) -> None:
        self.run, self.after = run, after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        follow = asyncio.create_task(self._send(send))
        watch = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((follow, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            follow.cancel()
            watch.cancel()

    async def _send(self, send: Send) -> None:
        async for out in self.run.follow(self.after):
            await send({"type": "http.response.body", "body": out, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Background:
    """The background responses of a server."""

    def __init__(self) -> None:
        self.runs: dict[str, ResponseRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def check_room(self) -> None:
        """Raises CapacityError."""
        if len(self.runs) >= MAX_BACKGROUND:
            raise CapacityError(f"{MAX_BACKGROUND} background responses are under way; ask again later")

    def start(self, run: ResponseRun) -> None:
        """Work on a response whose row is written."""
        self.runs[run.row.id] = run
        task = asyncio.create_task(self._work(run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def cancel(self, run: ResponseRun) -> None:
        """End a response, and wait until that is written."""
        run.response.cancel()
        if run.generation is not None:
            run.generation.cancel()
        await run.ended.wait()

    async def close(self) -> None:
        """Leave off; what is not answered stays as it is stored, and a later server goes on with it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self, run: ResponseRun) -> None:
        work_for(run.row.tenant)
        try:
            while run.response.status != "cancelled":
                try:
                    await self._once(run)
                    return
                except EngineError as error:
                    if isinstance(error, EngineStopped) or not passes(error):
                        raise
                    await asyncio.sleep(AGAIN_S)
            await run.keep()
        except (asyncio.CancelledError, EngineStopped):
            pass  # the server ends
        except Exception as error:
            run.tell(run.response.fail(logged(error), run.generation))
            await run.keep()
        finally:
            self.runs.pop(run.row.id, None)
            run.finish()

    async def _once(self, run: ResponseRun) -> None:
        generation = await run.start()
        async with generation:
            async with contextlib.aclosing(run.events()) as events:
                async for some in events:
                    run.tell(some)
