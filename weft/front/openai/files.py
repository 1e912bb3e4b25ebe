"""/v1/files: what batches read and write.

Source of the shapes: OpenAI's API reference, "Files".
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from weft.errors import EngineError, RequestError
from weft.front.openai.calls import Call, fresh_id, stored
from weft.front.openai.forms import Begin, parts
from weft.front.store.database import StoreFull
from weft.front.store.files import File, Upload

PURPOSES = ("batch", "user_data", "assistants", "fine-tune", "vision")
MAX_FIELD_BYTES = 4096
MAX_PAGE = 10_000
EXPIRES_S = (3600, 2_592_000)
"""OpenAI's bounds of `expires_after[seconds]`."""


def file_object(file: File) -> dict[str, Any]:
    expires = {} if file.expires is None else {"expires_at": file.expires}
    return {
        "id": file.id, "object": "file", "bytes": file.bytes, "created_at": file.created, "filename": file.filename,
        "purpose": file.purpose, "status": "processed", **expires,
    }  # fmt: skip


async def upload_file(call: Call) -> dict[str, Any]:
    """POST /v1/files, a form with `file` and `purpose`.  Raises RequestError, StoreFull; then nothing is left of it."""
    files = stored(call.service.store).files
    assert call.stream is not None
    upload: Upload | None = None
    filename, name, fields = "upload", "", dict[str, bytearray]()
    try:
        async for part in parts(call.stream, call.headers.get("content-type", "")):
            if isinstance(part, Begin):
                name = part.name
                if name == "file":
                    if upload is not None:
                        raise RequestError("the form has two parts called file; send one file at a time", param="file")
                    filename = part.filename or "upload"
                    upload = await files.begin(call.tenant, fresh_id("file-"), filename, "batch", None)
            elif name == "file":
                assert upload is not None
                await upload.write(part)
            else:
                field = fields.setdefault(name, bytearray())
                field += part
                if len(field) > MAX_FIELD_BYTES:
                    raise RequestError(f"{name[:60]!r} is longer than {MAX_FIELD_BYTES} bytes", param=name[:60])
        if upload is None:
            raise RequestError("the form has no part called file", param="file")
        await upload.describe(filename, _purpose(fields), _expires(fields))
        return file_object(await upload.finish())
    except BaseException as error:
        if upload is not None:
            with contextlib.suppress(StoreFull):  # swept by the next upload
                await upload.drop()
        if isinstance(error, EngineError):
            await _rest(call.stream, files.max_file)
        raise


async def _rest(stream: AsyncIterator[bytes], most: int) -> None:
    """Read what still comes of a refused upload, at most so many bytes: many clients look at the answer only when they have sent
    everything, and a connection that is closed before that takes the answer along.
    """
    with contextlib.suppress(RequestError, ClientDisconnect):
        async for data in stream:
            most -= len(data)
            if most < 0:
                return


async def list_files(call: Call) -> dict[str, Any]:
    """GET /v1/files.  Raises RequestError."""
    files, more = await stored(call.service.store).files.page(
        call.tenant,
        purpose=call.query.get("purpose"),
        after=call.after(),
        limit=call.number("limit", MAX_PAGE, 1, MAX_PAGE),
        ascending=call.choice("order", "desc", "asc") == "asc",
    )
    ends = {"first_id": files[0].id if files else "", "last_id": files[-1].id if files else ""}
    return {"object": "list", "data": [file_object(f) for f in files], "has_more": more, **ends}


async def get_file(call: Call) -> dict[str, Any]:
    """GET /v1/files/{id}.  Raises RequestError."""
    return file_object(await stored(call.service.store).files.get(call.tenant, call.id))


async def file_content(call: Call) -> StreamingResponse:
    """GET /v1/files/{id}/content, sent piece by piece and never as anything that a browser runs.  Raises RequestError."""
    files = stored(call.service.store).files
    file = await files.get(call.tenant, call.id)
    headers = {
        "content-length": str(file.bytes),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(files.pieces(file), headers=headers, media_type="application/octet-stream")


async def delete_file(call: Call) -> dict[str, Any]:
    """DELETE /v1/files/{id}.  Raises RequestError."""
    await stored(call.service.store).files.delete(call.tenant, call.id)
    return {"id": call.id, "object": "file", "deleted": True}


def _purpose(fields: dict[str, bytearray]) -> str:
    purpose = fields.get("purpose", bytearray()).decode("utf8", "replace")
    if purpose not in PURPOSES:
        raise RequestError(f"purpose must be one of {', '.join(PURPOSES)}", param="purpose")
    return purpose


def _expires(fields: dict[str, bytearray]) -> int | None:
    given = fields.get("expires_after[seconds]")
    if given is None:
        return None
    low, high = EXPIRES_S
    if not given.isdigit() or len(given) > 9 or not low <= int(given) <= high:
        raise RequestError(f"expires_after[seconds] must be from {low} to {high}", param="expires_after")
    return int(given)
