"""/v1/responses: answers that are kept, so that a later request goes on from them.

Source of the shapes: OpenAI's API reference, "Responses".
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import msgspec

from weft.errors import RequestError
from weft.front.openai.calls import Call, check_metadata, fresh_id, stored
from weft.front.openai.chat import chat_prompt
from weft.front.openai.own import label
from weft.front.openai.response_items import input_items, messages_of
from weft.front.openai.response_object import ResponseObject
from weft.front.openai.response_run import Followed, ResponseAnswer, ResponseRun
from weft.front.openai.response_structs import NEUTRAL, ResponseRequest
from weft.front.openai.service import Service
from weft.front.openai.services import Services
from weft.front.openai.structs import read
from weft.front.store.database import StoreFull
from weft.front.store.responses import Stored

encode = msgspec.json.encode
PAGE, MAX_PAGE = 20, 100


async def create_response(call: Call) -> ResponseAnswer | Followed | dict[str, Any]:
    """POST /v1/responses.  Raises RequestError."""
    request = read(call.body, ResponseRequest, NEUTRAL, lenient=call.service.lenient)
    if not request.background:
        run = await _prepare(call.service, request, call.tenant)
        return ResponseAnswer(run, await run.start(), stream=bool(request.stream))
    if not request.keeps:
        raise RequestError("background: true needs store: true; it is read from the store later", param="background")
    store = stored(call.service.store).responses
    background = call.service.background
    background.check_room()
    run = await _prepare(call.service, request, call.tenant, body=encode(request))
    await store.put(run.row)
    told = run.response.object()
    background.start(run)
    return Followed(run) if request.stream else told


async def get_response(call: Call) -> Followed | dict[str, Any]:
    """GET /v1/responses/{id}; with stream=true the events of one that is under way in the background.  Raises RequestError."""
    found = await stored(call.service.store).responses.get(call.tenant, call.id)
    run = call.service.background.runs.get(found.id)
    if call.choice("stream", "false", "true") == "true":
        if run is None:
            raise RequestError(
                "only a background response that is under way is streamed; this one is answered: leave stream out",
                param="stream",
            )
        return Followed(run, call.number("starting_after", -1, 0, 1 << 29))
    body: dict[str, Any] = run.response.object() if run is not None else msgspec.json.decode(found.body)
    return body


async def delete_response(call: Call) -> dict[str, Any]:
    """DELETE /v1/responses/{id}.  Raises RequestError."""
    store = stored(call.service.store).responses
    found = await store.get(call.tenant, call.id)
    run = call.service.background.runs.get(found.id)
    if run is not None:
        run.dropped = True
        await call.service.background.cancel(run)
    await store.delete(call.tenant, found.id)
    return {"id": found.id, "object": "response", "deleted": True}


async def cancel_response(call: Call) -> dict[str, Any]:
    """POST /v1/responses/{id}/cancel, of background ones alone; one that has ended stays as it is.  Raises RequestError."""
    store = stored(call.service.store).responses
    found = await store.get(call.tenant, call.id)
    run = call.service.background.runs.get(found.id)
    if run is not None:
        await call.service.background.cancel(run)
        found = await store.get(call.tenant, found.id)
    body: dict[str, Any] = msgspec.json.decode(found.body)
    if not body["background"]:
        raise RequestError("only a response with background: true can be cancelled; close the connection of others")
    return body


async def input_items_of(call: Call) -> dict[str, Any]:
    """GET /v1/responses/{id}/input_items: what this response was given, without what it went on from.  Raises RequestError."""
    found = await stored(call.service.store).responses.get(call.tenant, call.id)
    items: list[dict[str, Any]] = msgspec.json.decode(found.items)
    if call.choice("order", "desc", "asc") == "desc":
        items.reverse()
    after, limit = call.after(), call.number("limit", PAGE, 1, MAX_PAGE)
    if after is not None:
        at = next((i for i, item in enumerate(items) if item["id"] == after), None)
        if at is None:
            raise RequestError(f"after: there is no item {after[:100]!r}", param="after")
        items = items[at + 1 :]
    page = items[:limit]
    ends = {"first_id": page[0]["id"] if page else "", "last_id": page[-1]["id"] if page else ""}
    return {"object": "list", "data": page, "has_more": len(items) > limit, **ends}


async def resume(services: Services) -> None:
    """Go on with background responses that an earlier server left, each by the model that it was asked of."""
    first = services.first
    if first.store is None:
        return
    for row in await first.store.responses.unanswered():
        assert row.request is not None
        told = msgspec.json.decode(row.body)
        try:
            request = msgspec.json.decode(row.request, type=ResponseRequest)
            service = services.of(request.model or told["model"])
            run = await _prepare(service, request, row.tenant, body=row.request, row=row)
        except (RequestError, msgspec.DecodeError) as error:
            # The model is another one now, what it went on from has gone, or another version of weft has written it.
            told |= {"status": "failed", "error": {"code": "server_error", "message": str(error)}}
            with contextlib.suppress(StoreFull):  # then the next start finds it again
                await first.store.responses.put(msgspec.structs.replace(row, body=encode(told), request=None))
            continue
        first.background.start(run)


async def _prepare(
    service: Service, request: ResponseRequest, tenant: str, *, body: bytes | None = None, row: Stored | None = None
) -> ResponseRun:
    """Check a request and lay its conversation out.  body: of a background one.  row: what is stored of it already."""
    check_metadata(request.metadata)
    store = None if service.store is None or not request.keeps else service.store.responses
    items = input_items(request.input) if row is None else msgspec.json.decode(row.items)
    before = []
    if request.previous_response_id is not None:
        kept = stored(service.store).responses
        before = await kept.conversation(tenant, request.previous_response_id)
    chat = request.as_chat(messages_of(request.instructions, [*before, *items]))
    model, prompt = await chat_prompt(service, chat)
    parts = service.techniques(model)
    created = int(time.time()) if row is None else msgspec.json.decode(row.body)["created_at"]
    response = ResponseObject(
        request, model, prompt.params, service.text.tokenizer, id=fresh_id("resp_") if row is None else row.id,
        created=created, kept=store is not None, manner=prompt.manner,
        label=label(chat, service.port.info.stack, parts, prompt.params.grammar),
    )  # fmt: skip
    if row is None:
        row = Stored(
            id=response.id, tenant=tenant, previous=request.previous_response_id, body=encode(response.object()),
            items=encode(items), request=body,
        )  # fmt: skip
    return ResponseRun(service, response, chat, prompt, row, store)
