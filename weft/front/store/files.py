"""Stored files: uploads and what batches wrote, in pieces, so that none is ever whole in memory.

A file's name is a text to show and nothing else: no path is made of it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import msgspec

from weft.errors import RequestError
from weft.front.store.database import Database, StoreFull

SCHEMA = """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL DEFAULT 0,
    created INTEGER NOT NULL,
    expires INTEGER,
    whole INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE pieces (
    file INTEGER NOT NULL REFERENCES files (seq),
    at INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (file, at)
);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    open INTEGER NOT NULL,
    state BLOB NOT NULL
);
CREATE TABLE results (
    batch INTEGER NOT NULL REFERENCES batches (seq),
    line INTEGER NOT NULL,
    failed INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (batch, line)
)
"""
PIECE_BYTES = 1 << 15
"""A transaction holds one of them several times over; what a process once had of memory for that it seldom gives back."""


class File(msgspec.Struct, frozen=True, kw_only=True):
    """One file; the fields are OpenAI's but `seq` and `tenant`.  Times in seconds since 1970."""

    seq: int
    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created: int
    expires: int | None = None


FIELDS = File.__struct_fields__
COLUMNS = ", ".join(FIELDS)
THERE = "whole = 1 AND (expires IS NULL OR expires > unixepoch())"


class FileStore:
    """max_bytes: of all files together.  max_file: of one."""

    def __init__(self, path: Path, schema: str, max_bytes: int, max_file: int) -> None:
        self.database = Database(path, schema, max_bytes=max_bytes)
        self.max_file = max_file
        self.undropped: list[int] = []
        """Uploads of which something is left, since there was no room even to delete it; the next upload sweeps them."""
        self.database.run_now(_sweep)

    def close(self) -> None:
        self.database.close()

    async def begin(self, tenant: str, id: str, filename: str, purpose: str, expires_s: int | None) -> Upload:
        """A file that is about to come; nobody sees it before it is whole.  Raises StoreFull."""
        now = int(time.time())

        def work(db: sqlite3.Connection) -> int:
            _sweep_expired(db)
            for seq in self.undropped:
                _remove(db, seq)
            return _insert(db, tenant, id, filename, purpose, now, None if expires_s is None else now + expires_s)

        swept = len(self.undropped)
        upload = Upload(self, await self.database.run(work), tenant, id)
        del self.undropped[:swept]
        return upload

    async def get(self, tenant: str, id: str) -> File:
        """Raises RequestError (404)."""
        row = await self.database.run(
            lambda db: db.execute(
                f"SELECT {COLUMNS} FROM files WHERE id = ? AND tenant = ? AND {THERE}", (id, tenant)
            ).fetchone()
        )
        if row is None:
            raise missing(id)
        return _file(row)

    async def page(
        self, tenant: str, *, purpose: str | None, after: str | None, limit: int, ascending: bool
    ) -> tuple[list[File], bool]:
        """(files, whether there are more).  after: an id; what follows it in the order is listed."""

        def work(db: sqlite3.Connection) -> list[tuple[object, ...]]:
            edge = _edge(db, "files", tenant, after, missing)
            sign, order = (">", "ASC") if ascending else ("<", "DESC")
            return db.execute(
                f"SELECT {COLUMNS} FROM files WHERE tenant = ? AND {THERE} AND (? IS NULL OR purpose = ?) "
                f"AND (? IS NULL OR seq {sign} ?) ORDER BY seq {order} LIMIT ?",
                (tenant, purpose, purpose, edge, edge, limit + 1),
            ).fetchall()

        rows = await self.database.run(work)
        return [_file(row) for row in rows[:limit]], len(rows) > limit

    async def delete(self, tenant: str, id: str) -> None:
        """Raises RequestError (404)."""

        def work(db: sqlite3.Connection) -> None:
            row = db.execute(f"SELECT seq FROM files WHERE id = ? AND tenant = ? AND {THERE}", (id, tenant)).fetchone()
            if row is None:
                raise missing(id)
            _remove(db, row[0])

        await self.database.run(work)

    async def pieces(self, file: File) -> AsyncIterator[bytes]:
        """The contents.  Ends early where the file is deleted meanwhile."""
        at, left = 0, file.bytes
        while left > 0:
            row = await self.database.run(
                lambda db, at=at: db.execute(  # type: ignore[misc]
                    "SELECT data FROM pieces WHERE file = ? AND at = ?", (file.seq, at)
                ).fetchone()
            )
            if row is None:
                return
            yield row[0]
            at, left = at + 1, left - len(row[0])

    async def lines(self, file: File, longest: int) -> AsyncIterator[bytes]:
        """The contents by lines, without their ends.  A line longer than `longest` bytes comes cut to longest + 1."""
        held = bytearray()
        async for piece in self.pieces(file):
            *ends, rest = piece.split(b"\n")
            for end in ends:
                held += end
                yield bytes(held[: longest + 1])
                held = bytearray()
            held += rest
            del held[longest + 1 :]
        if held:
            yield bytes(held)


class Upload:
    """A file on its way in: `write` what comes, then `finish`, or `drop` it."""

    def __init__(self, store: FileStore, seq: int, tenant: str, id: str) -> None:
        self._store, self.seq, self._tenant, self._id = store, seq, tenant, id
        self._held = bytearray()
        self._at = 0
        self.bytes = 0

    async def write(self, data: bytes) -> None:
        """Raises RequestError (413) beyond the largest file, StoreFull."""
        self.bytes += len(data)
        if self.bytes > self._store.max_file:
            raise RequestError(
                f"the file is longer than {self._store.max_file} bytes; send it in parts, or start the server with a "
                "larger --max-file",
                param="file",
                code="body_too_large",
            )
        self._held += data
        while len(self._held) >= PIECE_BYTES:
            await self._put(bytes(self._held[:PIECE_BYTES]))
            del self._held[:PIECE_BYTES]

    async def finish(self) -> File:
        """The file, from now on there for its tenant.  Raises StoreFull."""
        if self._held:
            await self._put(bytes(self._held))
        await self._store.database.run(
            lambda db: db.execute("UPDATE files SET whole = 1, bytes = ? WHERE seq = ?", (self.bytes, self.seq))
        )
        return await self._store.get(self._tenant, self._id)

    async def describe(self, filename: str, purpose: str, expires_s: int | None) -> None:
        """What a form said of the file, perhaps after its contents."""
        await self._store.database.run(
            lambda db: db.execute(
                "UPDATE files SET filename = ?, purpose = ?, expires = created + ? WHERE seq = ?",
                (filename, purpose, expires_s, self.seq),
            )
        )

    async def drop(self) -> None:
        try:
            await self._store.database.run(lambda db: _remove(db, self.seq))
        except StoreFull:
            self._store.undropped.append(self.seq)
            raise

    async def _put(self, piece: bytes) -> None:
        at, self._at = self._at, self._at + 1
        await self._store.database.run(
            lambda db: db.execute("INSERT INTO pieces (file, at, data) VALUES (?, ?, ?)", (self.seq, at, piece))
        )


def write_now(
    db: sqlite3.Connection, tenant: str, id: str, filename: str, purpose: str, lines: Iterable[bytes]
) -> None:
    """A whole file inside a transaction of somebody else's, from lines that are read as they are written."""
    seq = _insert(db, tenant, id, filename, purpose, int(time.time()), None)
    held, at, total = bytearray(), 0, 0
    put = "INSERT INTO pieces (file, at, data) VALUES (?, ?, ?)"
    for line in lines:
        held += line + b"\n"
        while len(held) >= PIECE_BYTES:
            db.execute(put, (seq, at, bytes(held[:PIECE_BYTES])))
            del held[:PIECE_BYTES]
            at, total = at + 1, total + PIECE_BYTES
    if held:
        db.execute(put, (seq, at, bytes(held)))
    db.execute("UPDATE files SET whole = 1, bytes = ? WHERE seq = ?", (total + len(held), seq))


def missing(id: str) -> RequestError:
    """What is said of a file that is not there, and of another tenant's in the same words."""
    return RequestError(f"there is no file {id[:100]!r} here", param="file_id", code="not_found")


def _edge(db: sqlite3.Connection, table: str, tenant: str, after: str | None, missing: object) -> int | None:
    """The place in the order of what a listing goes on after.  Raises RequestError (404)."""
    if after is None:
        return None
    row = db.execute(f"SELECT seq FROM {table} WHERE id = ? AND tenant = ?", (after, tenant)).fetchone()
    if row is None:
        assert callable(missing)
        raise missing(after)
    return int(row[0])


def _insert(
    db: sqlite3.Connection, tenant: str, id: str, filename: str, purpose: str, now: int, expires: int | None
) -> int:
    made = db.execute(
        "INSERT INTO files (id, tenant, filename, purpose, created, expires) VALUES (?, ?, ?, ?, ?, ?)",
        (id, tenant, filename, purpose, now, expires),
    )
    assert made.lastrowid is not None
    return made.lastrowid


def _file(row: tuple[object, ...]) -> File:
    return msgspec.convert(dict(zip(FIELDS, row, strict=True)), File)


def _remove(db: sqlite3.Connection, seq: int) -> None:
    db.execute("DELETE FROM pieces WHERE file = ?", (seq,))
    db.execute("DELETE FROM files WHERE seq = ?", (seq,))


def _sweep(db: sqlite3.Connection) -> None:
    """Drop uploads that an earlier server did not see the end of, and files whose time is over."""
    for (seq,) in db.execute("SELECT seq FROM files WHERE whole = 0").fetchall():
        _remove(db, seq)
    _sweep_expired(db)


def _sweep_expired(db: sqlite3.Connection) -> None:
    for (seq,) in db.execute("SELECT seq FROM files WHERE expires <= unixepoch()").fetchall():
        _remove(db, seq)
