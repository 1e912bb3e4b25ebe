"""Stored responses: what was answered, what it was asked, and what came before.  Bounded; the oldest go first.

A row belongs to a tenant, and to nobody else it is there.  A row with a `request` is not answered yet: it is a background
response that a server which starts works on.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from weft.errors import RequestError
from weft.front.store.database import Database, StoreFull

SCHEMA = """
CREATE TABLE responses (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    previous TEXT,
    body BLOB NOT NULL,
    items BLOB NOT NULL,
    request BLOB,
    bytes INTEGER NOT NULL
)
"""
MAX_CHAIN = 1000
"""Responses that one conversation may go back."""
MAX_CHAIN_BYTES = 32 << 20
"""What these may hold together, all of which is read for a request of a few bytes."""


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """One response.  body: as a client gets it.  items: its input.  request: the body that asked for it, until it is answered."""

    id: str
    tenant: str
    previous: str | None
    body: bytes
    items: bytes
    request: bytes | None = None

    @property
    def size(self) -> int:
        return len(self.body) + len(self.items) + len(self.request or b"")


class ResponseStore:
    """max_rows, max_bytes: beyond either, the oldest responses that are answered go."""

    def __init__(self, path: Path, max_rows: int, max_bytes: int) -> None:
        self._database = Database(path, SCHEMA)
        self.max_rows, self.max_bytes = max_rows, max_bytes
        self._rows, self._bytes = self._database.run_now(_total)

    def close(self) -> None:
        self._database.close()

    async def put(self, stored: Stored) -> None:
        """Write a response, over an earlier state of it.

        Raises StoreFull, and then the earlier state stands: the disk is full, or the bounds are, of responses without an answer.
        """

        def work(db: sqlite3.Connection) -> None:
            old = db.execute("SELECT bytes FROM responses WHERE id = ?", (stored.id,)).fetchone()
            db.execute(
                "INSERT INTO responses (id, tenant, previous, body, items, request, bytes) VALUES (?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET body = excluded.body, request = excluded.request, bytes = excluded.bytes",
                (
                    stored.id, stored.tenant, stored.previous, stored.body, stored.items, stored.request, stored.size,
                ),
            )  # fmt: skip
            rows = self._rows + (old is None)
            size = self._bytes + stored.size - (old[0] if old else 0)
            self._rows, self._bytes = self._trim(db, rows, size)

        try:
            await self._database.run(work)
        except StoreFull:
            self._rows, self._bytes = await self._database.run(_total)
            raise

    async def get(self, tenant: str, id: str) -> Stored:
        """Raises RequestError (404)."""
        row = await self._database.run(
            lambda db: db.execute(
                "SELECT previous, body, items, request FROM responses WHERE id = ? AND tenant = ?", (id, tenant)
            ).fetchone()
        )
        if row is None:
            raise missing(id)
        return Stored(id=id, tenant=tenant, previous=row[0], body=row[1], items=row[2], request=row[3])

    async def delete(self, tenant: str, id: str) -> None:
        """Raises RequestError (404)."""

        def work(db: sqlite3.Connection) -> None:
            gone = db.execute("DELETE FROM responses WHERE id = ? AND tenant = ? RETURNING bytes", (id, tenant))
            row = gone.fetchone()
            if row is None:
                raise missing(id)
            self._rows, self._bytes = self._rows - 1, self._bytes - row[0]

        await self._database.run(work)

    async def conversation(self, tenant: str, id: str) -> list[dict[str, Any]]:
        """Items of a response and of all before it, in their order: input, output, input, output.

        Raises RequestError where it, or one of those before it, is not there, or not answered, or where they are too many.
        """

        def work(db: sqlite3.Connection) -> list[tuple[bytes, bytes, bytes | None, str | None]]:
            found: list[tuple[bytes, bytes, bytes | None, str | None]] = []
            at: str | None = id
            size = 0
            while at is not None and len(found) <= MAX_CHAIN:
                row = db.execute(
                    "SELECT items, body, request, previous FROM responses WHERE id = ? AND tenant = ?", (at, tenant)
                ).fetchone()
                size += len(row[0]) + len(row[1]) if row else 0
                if size > MAX_CHAIN_BYTES:
                    raise RequestError(
                        f"the conversation that it goes on from has more than {MAX_CHAIN_BYTES} bytes; send it as input",
                        param="previous_response_id",
                    )
                if row is None:
                    raise RequestError(
                        f"the response {at[:100]!r} is not stored here, or not any more"
                        + ("" if at == id else ", and the one given goes on from it")
                        + "; send the conversation as input",
                        param="previous_response_id",
                        code="previous_response_not_found",
                    )
                found.append(row)
                at = row[3]
            return found[::-1]

        rows = await self._database.run(work)
        if len(rows) > MAX_CHAIN:
            raise RequestError(
                f"the conversation goes back over more than {MAX_CHAIN} responses; send it as input",
                param="previous_response_id",
            )
        if any(request is not None for _, _, request, _ in rows):
            raise RequestError(
                "previous_response_id names a response that is not answered yet; wait until it is",
                param="previous_response_id",
            )
        items: list[dict[str, Any]] = []
        for given, body, _, _ in rows:
            items += msgspec.json.decode(given)
            items += msgspec.json.decode(body)["output"]
        return items

    async def unanswered(self) -> Sequence[Stored]:
        """Background responses that an earlier server did not come to the end of, oldest first."""
        rows = await self._database.run(
            lambda db: db.execute(
                "SELECT id, tenant, previous, body, items, request FROM responses WHERE request IS NOT NULL ORDER BY seq"
            ).fetchall()
        )
        names = ("id", "tenant", "previous", "body", "items", "request")
        return [Stored(**dict(zip(names, row, strict=True))) for row in rows]

    def _trim(self, db: sqlite3.Connection, rows: int, size: int) -> tuple[int, int]:
        while rows > self.max_rows or size > self.max_bytes:
            oldest = db.execute(
                "SELECT seq, bytes FROM responses WHERE request IS NULL ORDER BY seq LIMIT ?",
                (max(1, rows - self.max_rows),),
            ).fetchall()
            if not oldest:
                raise StoreFull(
                    "the store is full of background responses that are not answered yet; wait, or cancel some"
                )
            db.executemany("DELETE FROM responses WHERE seq = ?", [(seq,) for seq, _ in oldest])
            rows, size = rows - len(oldest), size - sum(freed for _, freed in oldest)
        return rows, size


def missing(id: str) -> RequestError:
    """What is said of a response that is not there, and of another tenant's in the same words."""
    return RequestError(f"there is no response {id[:100]!r} here", param="response_id", code="not_found")


def _total(db: sqlite3.Connection) -> tuple[int, int]:
    rows, size = db.execute("SELECT COUNT(*), COALESCE(SUM(bytes), 0) FROM responses").fetchone()
    return int(rows), int(size)
