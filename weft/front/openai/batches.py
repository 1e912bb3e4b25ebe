"""/v1/batches: many requests in a file, answered in a file when there is room for them.

Source of the shapes: OpenAI's API reference, "Batch".
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from weft.errors import RequestError
from weft.front.openai.calls import Call, check_metadata, fresh_id, stored
from weft.front.openai.structs import read
from weft.front.store.batches import OPEN, Batch, Counts, Used

WINDOW, WINDOW_S = "24h", 24 * 3600
PAGE, MAX_PAGE = 20, 100


class BatchRequest(msgspec.Struct, kw_only=True):
    """Body of POST /v1/batches."""

    input_file_id: str | None = None
    endpoint: str | None = None
    completion_window: str | None = None
    metadata: dict[str, str] | None = None


async def create_batch(call: Call) -> Batch:
    """POST /v1/batches.  What is wrong with the input, the batch tells later.  Raises RequestError."""
    store, runner = stored(call.service.store), call.service.batches
    request = read(call.body, BatchRequest, {"output_expires_after": ()}, lenient=call.service.lenient)
    if request.endpoint not in runner.endpoints:
        raise RequestError(f"endpoint must be one of {', '.join(runner.endpoints)}", param="endpoint")
    if request.completion_window not in (None, WINDOW):
        raise RequestError(f"completion_window must be {WINDOW}", param="completion_window")
    if not request.input_file_id:
        raise RequestError("input_file_id is missing; give the id of a file with purpose batch", param="input_file_id")
    metadata = check_metadata(request.metadata)
    try:
        file = await store.files.get(call.tenant, request.input_file_id)
    except RequestError as error:
        raise RequestError(str(error), param="input_file_id", code=error.code) from None
    if file.purpose != "batch":
        raise RequestError(f"the file's purpose is {file.purpose}, not batch; upload it again", param="input_file_id")
    now = int(time.time())
    batch = Batch(
        id=fresh_id("batch_"), object="batch", endpoint=request.endpoint, input_file_id=file.id,
        completion_window=WINDOW, status="validating", created_at=now, expires_at=now + WINDOW_S,
        request_counts=Counts(), usage=Used(), metadata=metadata or None,
    )  # fmt: skip
    runner.start(await store.batches.add(call.tenant, batch))
    return batch


async def get_batch(call: Call) -> Batch:
    """GET /v1/batches/{id}.  Raises RequestError."""
    return (await stored(call.service.store).batches.get(call.tenant, call.id)).batch


async def list_batches(call: Call) -> dict[str, Any]:
    """GET /v1/batches, newest first.  Raises RequestError."""
    found, more = await stored(call.service.store).batches.page(
        call.tenant, after=call.after(), limit=call.number("limit", PAGE, 1, MAX_PAGE)
    )
    ends = {"first_id": found[0].id, "last_id": found[-1].id} if found else {}
    return {"object": "list", "data": found, "has_more": more, **ends}


async def cancel_batch(call: Call) -> Batch:
    """POST /v1/batches/{id}/cancel: lines under way are left off, and what was answered becomes a file.  Raises RequestError."""
    row = await stored(call.service.store).batches.get(call.tenant, call.id)
    if row.batch.status not in OPEN:
        raise RequestError(f"the batch is {row.batch.status} already", param="batch_id", code="conflict")
    return await call.service.batches.cancel(row)
