"""The record of an engine, in a file that only its owner can read: it holds prompts and answers.

Entries of `types.record` in msgpack, each after its length in 4 bytes (JSON would lose log-probabilities of minus infinity).

    tap(engine, path)      before its first request; whoever drives the engine need not know
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from weft.core.engine import Engine
from weft.errors import ConfigError
from weft.types import Abandoned, Committed, Entry

MODE = 0o600


class Record:
    """Writes entries; after each step what was written is handed to the system."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, MODE), "wb")
            path.chmod(MODE)
        except OSError as error:
            raise ConfigError(f"--record {path} cannot be written: {error}") from None
        self._encode = msgspec.msgpack.Encoder().encode

    def __call__(self, entry: Entry) -> None:
        data = self._encode(entry)
        self._file.write(len(data).to_bytes(4, "little") + data)
        if isinstance(entry, Committed | Abandoned):
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def tap(engine: Engine, path: Path) -> Record:
    """Record everything that the engine is told and decides from now on.  Raises ConfigError."""
    if engine.cuts or engine.requests():
        raise ConfigError("a record begins before the first request, of an engine whose cuts are those of its stack")
    record = Record(path)
    record(engine.made)
    engine.tap = record
    return record
