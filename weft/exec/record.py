"""The record of an engine, in a file that only its owner can read: it holds prompts and answers.

Entries of `types.record` in msgpack (JSON would lose log-probabilities of minus infinity), each after its length in 4 bytes and
before 4 bytes of checksum: the CRC-32 of all lengths and entries up to there, so that one that was changed, lost or moved is
noticed at the next one at the latest.  The last one, `Ended`, is written by `close`: a record without it is cut, and `weft sim
--replay` says where.

    tap(engine, path)      before its first request; whoever drives the engine need not know
"""

from __future__ import annotations

import logging
import os
import threading
import zlib
from pathlib import Path

import msgspec

from weft.core.engine import Engine
from weft.errors import ConfigError
from weft.types import Abandoned, Committed, Ended, Entry, Planned

MODE = 0o600
log = logging.getLogger("weft.record")


class Record:
    """Writes entries.  Each plan is handed to the system before it is carried out, and each result at once, so that a record has
    what an engine died of.  Where the file takes no more (its disk is full), that is logged and the engine goes on without.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, MODE)
            path.chmod(MODE)
        except OSError as error:
            raise ConfigError(f"--record {path} cannot be written: {error}") from None
        self._path, self._held, self._entries, self._sum = path, bytearray(), 0, 0
        self._turn = threading.Lock()
        self._encode = msgspec.msgpack.Encoder().encode

    def __call__(self, entry: Entry) -> None:
        with self._turn:
            self._take(entry, now=isinstance(entry, Planned | Committed | Abandoned))

    def close(self) -> None:
        """Write that the record ends here; what comes afterwards is left out.  From any thread."""
        with self._turn:
            self._take(Ended(), now=True)
            self._shut()

    def _take(self, entry: Entry, *, now: bool) -> None:
        if self._file is None:
            return
        data = self._encode(entry)
        data = len(data).to_bytes(4, "little") + data
        self._sum = zlib.crc32(data, self._sum)
        self._held += data
        self._held += self._sum.to_bytes(4, "little")
        self._entries += 1
        if now:
            self._write(self._file)

    def _write(self, file: int) -> None:
        try:
            while self._held:
                del self._held[: os.write(file, self._held)]
        except OSError as error:
            log.error(
                "the record %s is cut before its entry %d, and nothing more is written to it: %s",
                self._path, self._entries, error,
            )  # fmt: skip
            self._shut()

    def _shut(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def tap(engine: Engine, path: Path) -> Record:
    """Record everything that the engine is told and decides from now on.  Raises ConfigError."""
    if engine.cuts or engine.requests():
        raise ConfigError("a record begins before the first request, of an engine whose cuts are those of its stack")
    record = Record(path)
    record(engine.made)
    engine.tap = record
    return record
