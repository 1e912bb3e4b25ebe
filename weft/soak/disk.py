"""A full disk under the store of a server: what is told while nothing can be written, and what is there afterwards."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from pathlib import Path
from typing import Any

from weft.soak.client import Lost, send
from weft.soak.faults import Impossible, full

LINES = 8
TOO_LARGE = 1 << 20
"""Bytes of an upload that is meant to find no room."""
TOLD = (507, 503)
WAIT_S = 120.0
BOUND = "weft-soak"


class Store:
    """What a soak keeps with a server: a file, and what a batch over it gives.  folder: where the server keeps it."""

    def __init__(self, port: int, folder: Path) -> None:
        self._port, self._folder = port, folder
        self._data = b"".join(json.dumps(_line(i)).encode() + b"\n" for i in range(LINES))
        self._file = ""
        self._calm: dict[str, Any] = {}

    async def prepare(self) -> None:
        """Upload the file, and learn a batch's answers while nothing is broken.  Raises Lost."""
        status, made = await self._upload(self._data)
        if status != 200:
            raise Lost(f"an upload was refused: {made}")
        self._file = made["id"]
        self._calm = await self._answers(await self._begin())

    async def fault(self, pid: int) -> list[str]:
        """Let the disk of the server be full while a batch is worked on; what was lost by it, in words.

        Raises Impossible where the disk does not fill, and Lost where the server does not answer.
        """
        lost = []
        batch = await self._begin()
        with full(pid):
            status, told = await self._upload(b"x" * TOO_LARGE)
            if status == 200:
                raise Impossible("an upload was taken all the same")
            if status not in TOLD or "room" not in str(told.get("error", {}).get("message")):
                lost.append(f"an upload to a full disk: {status} {told}")
            status, other = await self._json("POST", "/v1/batches", self._order())
            if status not in (200, *TOLD):
                lost.append(f"a batch on a full disk: {status} {other}")
            if await self._content() != self._data:
                lost.append("a file cannot be read while the disk is full")
        for id in [batch, *([other["id"]] if status == 200 else [])]:
            if (found := await self._answers(id)) != self._calm:
                lost.append(f"a batch that was there when the disk was full gave {str(found)[:300]}")
        return [*lost, *await self.intact()]

    async def intact(self) -> list[str]:
        """What is wrong with the store, in words.  Raises Lost."""
        wrong = [] if await self._content() == self._data else ["the stored file has changed"]
        for path in sorted(self._folder.glob("*.sqlite")):
            found = await asyncio.to_thread(_check, path)
            wrong += [] if found == "ok" else [f"{path.name}: {found}"]
        return wrong

    # ------------------------------------------------------------------ requests

    async def _json(self, method: str, route: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        status, told = await send(self._port, method, route, b"" if body is None else json.dumps(body).encode())
        return status, json.loads(told)

    async def _upload(self, data: bytes) -> tuple[int, dict[str, Any]]:
        form = (
            f'--{BOUND}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--{BOUND}\r\n'
            'Content-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
        ).encode()
        body = form + data + f"\r\n--{BOUND}--\r\n".encode()
        status, told = await send(self._port, "POST", "/v1/files", body, f"multipart/form-data; boundary={BOUND}")
        return status, json.loads(told)

    async def _content(self) -> bytes:
        return (await send(self._port, "GET", f"/v1/files/{self._file}/content"))[1]

    def _order(self) -> dict[str, Any]:
        return {"input_file_id": self._file, "endpoint": "/v1/completions", "completion_window": "24h"}

    async def _begin(self) -> str:
        status, made = await self._json("POST", "/v1/batches", self._order())
        if status != 200:
            raise Lost(f"a batch was refused: {made}")
        return str(made["id"])

    async def _answers(self, batch: str) -> dict[str, Any]:
        """By custom_id, once the batch has ended; its output is deleted, so that stores do not grow.  Raises Lost."""
        until = time.monotonic() + WAIT_S
        while (found := (await self._json("GET", f"/v1/batches/{batch}"))[1])["status"] in (
            "validating",
            "in_progress",
            "finalizing",
        ):
            if time.monotonic() > until:
                raise Lost(f"a batch does not end: {found}")
            await asyncio.sleep(0.1)
        output = found.get("output_file_id")
        if found["status"] != "completed" or output is None:
            return {"status": found["status"], "errors": found.get("errors")}
        told = (await send(self._port, "GET", f"/v1/files/{output}/content"))[1]
        await send(self._port, "DELETE", f"/v1/files/{output}")
        rows = [json.loads(row) for row in told.splitlines()]
        texts = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows}
        counts, used = found["request_counts"], found["usage"]["total_tokens"]
        return {"texts": texts, "counts": counts, "used": used, "rows": len(rows)}


def _line(i: int) -> dict[str, Any]:
    body = {"prompt": f"The sea was {i}", "seed": i, "max_tokens": 12, "ignore_eos": True}
    return {"custom_id": f"line-{i}", "method": "POST", "url": "/v1/completions", "body": body}


def _check(path: Path) -> str:
    """What SQLite itself says of a database that a server has open."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)
    try:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])
    finally:
        connection.close()
