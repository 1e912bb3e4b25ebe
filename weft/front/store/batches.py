"""Stored batches: their state, and the result of every line, each written in one transaction with the counts that it changes."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

import msgspec

from weft.errors import RequestError
from weft.front.store.files import FileStore, _edge, write_now

OPEN = frozenset({"validating", "in_progress", "finalizing", "cancelling"})
"""States that a server works on."""


class Counts(msgspec.Struct, kw_only=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Fault(msgspec.Struct):
    """Why a batch failed; line: of the input file, from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Faults(msgspec.Struct, kw_only=True):
    data: list[Fault]
    object: str = "list"


class Cached(msgspec.Struct, kw_only=True):
    cached_tokens: int = 0


class Reasoned(msgspec.Struct, kw_only=True):
    reasoning_tokens: int = 0


class Used(msgspec.Struct, kw_only=True):
    """Tokens of all lines so far."""

    input_tokens: int = 0
    input_tokens_details: Cached = msgspec.field(default_factory=Cached)
    output_tokens: int = 0
    output_tokens_details: Reasoned = msgspec.field(default_factory=Reasoned)
    total_tokens: int = 0


class Batch(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A batch in OpenAI's shape; what is null there is left out.  Times in seconds since 1970."""

    id: str
    object: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: str
    created_at: int
    request_counts: Counts
    usage: Used
    expires_at: int | None = None
    model: str | None = None
    errors: Faults | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    metadata: dict[str, str] | None = None

    def enter(self, status: str) -> None:
        """Change the state, and note when."""
        self.status = status
        if status != "validating":
            setattr(self, f"{status}_at", int(time.time()))


class Row(msgspec.Struct, kw_only=True):
    """A batch as it is stored."""

    seq: int
    tenant: str
    batch: Batch


class BatchStore:
    """In the database of the files, as a batch's results become files in one transaction with its end."""

    def __init__(self, files: FileStore) -> None:
        self._database = files.database
        self._unwritten: dict[str, Batch] = {}
        """Ends that could not be written, as the disk was full: told until the server ends, and tried again at its next start."""

    async def add(self, tenant: str, batch: Batch) -> Row:
        """Raises StoreFull."""
        state = msgspec.json.encode(batch)

        def work(db: sqlite3.Connection) -> int:
            made = db.execute(
                "INSERT INTO batches (id, tenant, open, state) VALUES (?, ?, 1, ?)", (batch.id, tenant, state)
            )
            assert made.lastrowid is not None
            return made.lastrowid

        return Row(seq=await self._database.run(work), tenant=tenant, batch=batch)

    async def get(self, tenant: str, id: str) -> Row:
        """Raises RequestError (404)."""
        row = await self._database.run(
            lambda db: db.execute("SELECT seq, state FROM batches WHERE id = ? AND tenant = ?", (id, tenant)).fetchone()
        )
        if row is None:
            raise missing(id)
        return self._row(row[0], tenant, row[1])

    async def page(self, tenant: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """(batches, newest first, whether there are more)."""

        def work(db: sqlite3.Connection) -> list[tuple[int, bytes]]:
            edge = _edge(db, "batches", tenant, after, missing)
            return db.execute(
                "SELECT seq, state FROM batches WHERE tenant = ? AND (? IS NULL OR seq < ?) ORDER BY seq DESC LIMIT ?",
                (tenant, edge, edge, limit + 1),
            ).fetchall()

        rows = await self._database.run(work)
        return [self._row(seq, tenant, state).batch for seq, state in rows[:limit]], len(rows) > limit

    async def unfinished(self) -> list[Row]:
        """Batches that an earlier server did not come to the end of, oldest first."""
        rows = await self._database.run(
            lambda db: db.execute("SELECT seq, tenant, state FROM batches WHERE open = 1 ORDER BY seq").fetchall()
        )
        return [self._row(*row) for row in rows]

    async def save(self, row: Row) -> None:
        """Write the state as it is now.  Raises StoreFull."""
        await self._database.run(lambda db: _update(db, row))

    async def done(self, row: Row) -> set[int]:
        """Lines that have a result."""
        rows = await self._database.run(
            lambda db: db.execute("SELECT line FROM results WHERE batch = ?", (row.seq,)).fetchall()
        )
        return {line for (line,) in rows}

    async def result(self, row: Row, line: int, data: bytes, *, failed: bool, used: Used) -> None:
        """Write the result of a line and what it changes in the batch, both or neither.  Raises StoreFull."""

        batch, changed = row.batch, False

        def work(db: sqlite3.Connection) -> None:
            nonlocal changed
            db.execute(
                "INSERT INTO results (batch, line, failed, data) VALUES (?, ?, ?, ?)", (row.seq, line, failed, data)
            )
            batch.request_counts.completed += not failed
            batch.request_counts.failed += failed
            batch.usage, changed = _sum(batch.usage, used), True
            _update(db, row)

        def undo() -> None:
            if changed:
                batch.request_counts.completed -= not failed
                batch.request_counts.failed -= failed
                batch.usage = _sum(batch.usage, used, -1)

        await self._database.run(work, undo)

    async def finish(self, row: Row, status: str, ids: tuple[str, str]) -> None:
        """Results become files, and the batch ends: all in one transaction.  ids: of the output and the error file.

        Raises StoreFull, and then nothing has changed.
        """
        before = msgspec.structs.replace(row.batch)

        def work(db: sqlite3.Connection) -> None:
            for failed, (id, name, field) in enumerate(zip(ids, ("output", "error"), FILE_FIELDS, strict=True)):
                rows = db.execute(
                    "SELECT data FROM results WHERE batch = ? AND failed = ? ORDER BY line", (row.seq, failed)
                )
                first = rows.fetchone()
                if first is not None:
                    lines = (data for data, *_ in (first, *rows))
                    write_now(db, row.tenant, id, f"{row.batch.id}_{name}.jsonl", "batch_output", lines)
                    setattr(row.batch, field, id)
            db.execute("DELETE FROM results WHERE batch = ?", (row.seq,))
            row.batch.enter(status)
            _update(db, row)

        try:
            await self._database.run(work)
        except BaseException:
            for name in Batch.__struct_fields__:
                setattr(row.batch, name, getattr(before, name))
            raise

    async def fail(self, row: Row, faults: list[Fault]) -> None:
        """End a batch without output.  Never raises for want of room: then the end is told, and not written."""
        row.batch.errors = Faults(data=faults)
        row.batch.enter("failed")

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM results WHERE batch = ?", (row.seq,))
            _update(db, row)

        try:
            await self._database.run(work)
        except Exception:
            self._unwritten[row.batch.id] = row.batch

    def _row(self, seq: int, tenant: str, state: bytes) -> Row:
        batch = msgspec.json.decode(state, type=Batch)
        return Row(seq=seq, tenant=tenant, batch=self._unwritten.get(batch.id, batch))


FILE_FIELDS = ("output_file_id", "error_file_id")


def missing(id: str) -> RequestError:
    """What is said of a batch that is not there, and of another tenant's in the same words."""
    return RequestError(f"there is no batch {id[:100]!r} here", param="batch_id", code="not_found")


def _update(db: sqlite3.Connection, row: Row) -> None:
    db.execute(
        "UPDATE batches SET open = ?, state = ? WHERE seq = ?",
        (row.batch.status in OPEN, msgspec.json.encode(row.batch), row.seq),
    )


def _sum(a: Used, b: Used, sign: int = 1) -> Used:
    return Used(
        input_tokens=a.input_tokens + sign * b.input_tokens,
        input_tokens_details=Cached(
            cached_tokens=a.input_tokens_details.cached_tokens + sign * b.input_tokens_details.cached_tokens
        ),
        output_tokens=a.output_tokens + sign * b.output_tokens,
        total_tokens=a.total_tokens + sign * b.total_tokens,
    )


def read_used(answer: dict[str, Any]) -> Used:
    """Tokens of one answer, by whichever of OpenAI's two sets of names it has."""
    usage = answer.get("usage") or {}
    given = usage.get("prompt_tokens", usage.get("input_tokens", 0))
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    out = usage.get("completion_tokens", usage.get("output_tokens", 0))
    cached = Cached(cached_tokens=details.get("cached_tokens", 0))
    return Used(input_tokens=given, input_tokens_details=cached, output_tokens=out, total_tokens=given + out)
