"""Works on batches: every line once, whenever there is room, over the end of a server too.

A line's result is written in one transaction with the counts that it changes; what has no result when a server starts is
what is still to do.  Lines run at a low priority and a few at a time, so that whoever waits for an answer is served first.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec

from weft.errors import EngineError, RequestError
from weft.front.admission import work_for
from weft.front.openai.answer import JSONAnswer, logged
from weft.front.openai.calls import Call, fresh_id
from weft.front.openai.chat import chat
from weft.front.openai.completions import complete
from weft.front.openai.embeddings import embed
from weft.front.openai.errors import error_payload, passes, status_of
from weft.front.openai.response_run import ResponseAnswer
from weft.front.openai.responses import create_response
from weft.front.openai.service import Service
from weft.front.openai.services import Services
from weft.front.store import Store
from weft.front.store.batches import Batch, Fault, Row, Used, read_used
from weft.front.store.database import StoreFull

LOW = 1 << 20
"""Priority of a line; lower runs first, and clients get 0 unless they say otherwise."""
AT_ONCE = 32
"""Lines of all batches that the engine has at once, at most; fewer where it computes fewer sequences."""
AGAIN_S = 0.5
ROOM_S = 60.0
"""How long a batch waits for room on a full disk before it fails: a moment without any costs it nothing."""
MAX_LINES = 50_000
MAX_LINE_BYTES = 32 << 20
MAX_FAULTS = 100
"""Lines with something wrong that a batch tells of."""
MAX_CUSTOM_ID = 512
encode = msgspec.json.encode


class Line(msgspec.Struct, kw_only=True):
    """One request of a batch."""

    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


Answering = Callable[[Service, Row, bytes], Awaitable[Any]]


class BatchRunner:
    """The batches of a server; a line is asked of the model that it names.  endpoints: what lines may ask, and who answers."""

    def __init__(self, services: Services, store: Store | None) -> None:
        self._services, self._kept = services, store
        self.endpoints: dict[str, Answering] = {
            "/v1/chat/completions": lambda service, _, body: chat(service, body),
            "/v1/completions": lambda service, _, body: complete(service, body),
            "/v1/embeddings": lambda service, row, body: embed(Call(service=service, tenant=row.tenant, body=body)),
            "/v1/responses": _response,
        }
        self._work: dict[str, tuple[Row, asyncio.Task[None]]] = {}
        self._rooms: dict[Service, asyncio.Semaphore] = {}

    async def resume(self) -> None:
        """Go on with what an earlier server left."""
        if self._kept is not None:
            for row in await self._kept.batches.unfinished():
                self.start(row)

    def start(self, row: Row) -> None:
        """Begin with a batch that is stored, or go on with it."""
        task = asyncio.create_task(self._run(row))
        self._work[row.batch.id] = row, task
        task.add_done_callback(lambda _: self._work.pop(row.batch.id, None))

    async def cancel(self, row: Row) -> Batch:
        """The batch, cancelling; its task then writes what there is."""
        row, task = self._work.get(row.batch.id, (row, None))
        row.batch.enter("cancelling")
        await self._store.batches.save(row)
        told = msgspec.structs.replace(row.batch)
        if task is not None:
            task.cancel()
        return told

    async def close(self) -> None:
        """Leave off; every batch stays as it is stored."""
        tasks = [task for _, task in self._work.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _store(self) -> Store:
        assert self._kept is not None
        return self._kept

    # ------------------------------------------------------------------------------------------ one batch

    async def _run(self, row: Row) -> None:
        work_for(row.tenant)
        try:
            await self._through(row)
        except asyncio.CancelledError:
            if row.batch.status != "cancelling":
                raise  # the server ends
            await self._finish(row, "cancelled")
        except StoreFull as error:
            await self._fail(row, "storage_full", str(error))
        except RequestError as error:  # the input has been deleted
            await self._fail(row, error.code or "invalid_input", str(error))
        except Exception as error:
            logged(error)
            await self._fail(row, "server_error", str(error_payload(error)["error"]["message"]))

    async def _through(self, row: Row) -> None:
        """From whatever state it is in to its end."""
        batch = row.batch
        if batch.status == "cancelling":
            await self._finish(row, "cancelled")
            return
        if batch.status == "validating":
            faults = await self._look_through(row)
            if faults:
                await self._store.batches.fail(row, faults)
                return
            batch.enter("in_progress")
            await self._written(lambda: self._store.batches.save(row))
        done = await self._store.batches.done(row)
        left = max(0.0, (batch.expires_at or 1 << 40) - time.time())
        try:
            async with asyncio.timeout(left):
                await self._answer_all(row, done)
            await self._finish(row, "completed")
        except TimeoutError:
            await self._expire(row)

    async def _finish(self, row: Row, status: str) -> None:
        if status == "completed":
            row.batch.enter("finalizing")
        ids = fresh_id("file-"), fresh_id("file-")
        await self._written(lambda: self._store.batches.finish(row, status, ids))

    async def _written(self, write: Callable[[], Awaitable[None]]) -> None:
        """Write as soon as there is room.  Raises StoreFull where there is none for ROOM_S."""
        until = time.monotonic() + ROOM_S
        while True:
            try:
                return await write()
            except StoreFull:
                if time.monotonic() >= until:
                    raise
            await asyncio.sleep(AGAIN_S)

    async def _fail(self, row: Row, code: str, message: str) -> None:
        await self._store.batches.fail(row, [Fault(code, message)])

    async def _lines(self, row: Row) -> AsyncGenerator[tuple[int, bytes], None]:
        """(number from 1, text) of every line that is not blank."""
        file = await self._store.files.get(row.tenant, row.batch.input_file_id)
        number = 0
        async for line in self._store.files.lines(file, MAX_LINE_BYTES):
            number += 1
            if line.strip():
                yield number, line

    async def _look_through(self, row: Row) -> list[Fault]:
        """What is wrong with the input; counts its lines and notes its model."""
        faults: list[Fault] = []
        seen: set[str] = set()
        total = 0
        async for number, text in self._lines(row):
            total += 1
            if total > MAX_LINES:
                return [Fault("too_many_requests", f"the input has more than {MAX_LINES} lines")]
            try:
                line = self._read(row, text)
                if line.custom_id in seen:
                    raise RequestError("this custom_id has come before", param="custom_id", code="duplicate")
                seen.add(line.custom_id)
                model = line.body.get("model")
                if row.batch.model is None and isinstance(model, str):
                    row.batch.model = model[:200]
            except RequestError as error:
                faults.append(Fault(error.code or "invalid_request", str(error), error.param, number))
                if len(faults) == MAX_FAULTS:
                    break
        if not total:
            faults.append(Fault("empty_file", "the input has no lines"))
        row.batch.request_counts.total = total
        return faults

    def _read(self, row: Row, text: bytes) -> Line:
        """One line, checked as far as it can be without asking.  Raises RequestError."""
        if len(text) > MAX_LINE_BYTES:
            raise RequestError(f"the line is longer than {MAX_LINE_BYTES} bytes", code="line_too_long")
        try:
            line = msgspec.json.decode(text, type=Line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(f"the line is no request: {error}", code="invalid_json_line") from None
        if not 0 < len(line.custom_id) <= MAX_CUSTOM_ID:
            raise RequestError(f"custom_id must have 1 to {MAX_CUSTOM_ID} characters", param="custom_id")
        if line.method != "POST":
            raise RequestError("method must be POST", param="method")
        if line.url != row.batch.endpoint:
            raise RequestError(f"url must be the batch's endpoint, {row.batch.endpoint}", param="url")
        for name in ("stream", "background"):
            if line.body.get(name):
                raise RequestError(f"{name} has no place in a batch; leave it out", param=f"body.{name}")
        return line

    # ------------------------------------------------------------------------------------------ its lines

    async def _answer_all(self, row: Row, done: set[int]) -> None:
        try:
            async with asyncio.TaskGroup() as group, contextlib.aclosing(self._lines(row)) as lines:
                async for number, text in lines:
                    if number not in done:
                        line = self._read(row, text)
                        room = self._room(line)
                        await room.acquire()
                        task = group.create_task(self._answer(row, number, line))
                        task.add_done_callback(lambda _, room=room: room.release())  # type: ignore[misc]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def _room(self, line: Line) -> asyncio.Semaphore:
        """What the lines of one model take turns in: a model that is away holds up no other's."""
        try:
            service = self._services.of(line.body.get("model"))
        except RequestError:  # which is its answer, in its turn
            service = self._services.first
        if service not in self._rooms:
            self._rooms[service] = asyncio.Semaphore(min(AT_ONCE, service.port.info.max_num_seqs))
        return self._rooms[service]

    async def _answer(self, row: Row, number: int, line: Line) -> None:
        """Ask one line, and write what came of it."""
        while True:
            try:
                status, body = 200, await self._ask(row, line)
            except EngineError as error:
                if passes(error):
                    await asyncio.sleep(AGAIN_S)
                    continue
                status, body = status_of(error), error_payload(error)
            break
        result = {
            "id": fresh_id("batch_req_"), "custom_id": line.custom_id,
            "response": {"status_code": status, "request_id": fresh_id("req_"), "body": body}, "error": None,
        }  # fmt: skip
        used = read_used(body) if status == 200 else Used()
        data, failed = encode(result), status != 200
        await self._written(lambda: self._store.batches.result(row, number, data, failed=failed, used=used))

    async def _ask(self, row: Row, line: Line) -> dict[str, Any]:
        given = line.body.get("priority")
        given = given if isinstance(given, int) else 0
        asked = {name: value for name, value in line.body.items() if name != "stream"}  # it is false, or was refused
        body = encode({**asked, "priority": max(LOW, min(given, (1 << 31) - 1))})
        made = await self.endpoints[row.batch.endpoint](self._services.of(line.body.get("model")), row, body)
        if isinstance(made, JSONAnswer | ResponseAnswer):
            async with made.generation:
                made = msgspec.json.decode(await made.whole())
        answer: dict[str, Any] = made
        return answer

    async def _expire(self, row: Row) -> None:
        """Lines without a result become errors, and the batch ends."""
        done = await self._store.batches.done(row)
        async for number, text in self._lines(row):
            if number not in done:
                late = {"code": "batch_expired", "message": "the batch's time was over before this line's turn"}
                result = {
                    "id": fresh_id("batch_req_"), "custom_id": self._read(row, text).custom_id, "response": None,
                    "error": late,
                }  # fmt: skip
                await self._store.batches.result(row, number, encode(result), failed=True, used=Used())
        await self._finish(row, "expired")


async def _response(service: Service, row: Row, body: bytes) -> Any:
    """A response of a batch is kept in the batch's output, and in the store only where it says so itself."""
    given = msgspec.json.decode(body)
    if given.get("store") is not True:
        body = encode({**given, "store": False})
    return await create_response(Call(service=service, tenant=row.tenant, body=body))
