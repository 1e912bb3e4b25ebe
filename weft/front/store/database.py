"""`Database`: one SQLite file, read and written on a thread of its own, so that no stream waits for a disk.

Write-ahead log (sqlite.org/wal.html): what was committed is there after `kill -9`, and half of a transaction never is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from weft.errors import CapacityError, ConfigError

BUSY_S = 10.0
LOG_BYTES = 64 << 20
"""What the write-ahead log is cut back to."""
FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_FSYNC)
"""What SQLite says of a disk, or of a file at its largest size, that takes no more."""
CACHE_BYTES = 64 << 10
"""Of pages, for each database.  The system has the file in memory anyway; SQLite's own 2 MB would fill up over hours."""

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]


class StoreFull(CapacityError):
    """The disk is full, or the store is as large as it may become.  HTTP 507."""

    code = "storage_full"
    param = None


class Database:
    """A SQLite file with the tables of `schema`.

    version: of the schema; a file of another version is refused.  max_bytes: the file's largest size, None for none.
    Raises ConfigError where it cannot be opened.
    """

    def __init__(self, path: Path, schema: str, *, version: int = 1, max_bytes: int | None = None) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"weft-{path.stem}")
        try:
            self._connection = self._thread.submit(_open, path, schema, version, max_bytes).result()
        except sqlite3.Error as error:
            self._thread.shutdown()
            raise ConfigError(f"{path} cannot be used ({error}); give another folder with --data-dir") from None
        except BaseException:
            self._thread.shutdown()
            raise

    async def run(self, work: Work[T], undo: Callable[[], None] = lambda: None) -> T:
        """Do `work` as one transaction: all of it, or nothing where it raises.  Raises StoreFull.

        undo: takes back, on the same thread, what `work` changed elsewhere, where nothing came of it.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work, undo)

    def run_now(self, work: Work[T]) -> T:
        """As `run`, for who has no event loop; waits."""
        return self._thread.submit(self._transact, work).result()

    def close(self) -> None:
        """Finish what was begun, and close the file."""
        self._thread.submit(self._connection.close)
        self._thread.shutdown(wait=True)

    def _transact(self, work: Work[T], undo: Callable[[], None] = lambda: None) -> T:
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                done = work(connection)
                connection.execute("COMMIT")
                return done
            except BaseException:
                undo()
                with contextlib.suppress(sqlite3.Error):  # SQLite has rolled back by itself where the disk is full
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) in FULL:
                raise StoreFull(f"there is no room left for {self.path.name}; delete files or responses") from None
            raise


def _open(path: Path, schema: str, version: int, max_bytes: int | None) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # nobody else reads what clients said
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        for setting in (
            "synchronous=NORMAL",
            "secure_delete=ON",
            "trusted_schema=OFF",
            f"journal_size_limit={LOG_BYTES}",
            f"cache_size=-{CACHE_BYTES >> 10}",
        ):
            connection.execute(f"PRAGMA {setting}")
        if max_bytes is not None:
            page = connection.execute("PRAGMA page_size").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count={max(64, max_bytes // page)}")
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, version):
            raise ConfigError(f"{path} was written by another version of weft; give another folder with --data-dir")
        if not found:
            connection.executescript(f"BEGIN;{schema};PRAGMA user_version={version};COMMIT;")
    except BaseException:
        connection.close()
        raise
    return connection
