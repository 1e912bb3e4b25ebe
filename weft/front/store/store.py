"""`Store`: the folder of one server, with its databases.  Two servers never share one, as each batch is worked on once."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from weft.errors import ConfigError
from weft.front.store.batches import BatchStore
from weft.front.store.files import SCHEMA as FILES
from weft.front.store.files import FileStore
from weft.front.store.responses import ResponseStore

MAX_RESPONSES = 10_000
MAX_BYTES = 4 << 30
MAX_FILE_BYTES = 512 << 20
"""OpenAI's bound of a file."""


def default_folder() -> Path:
    """Where a server keeps what it stores: `store` below WEFT_HOME, else below ~/.weft."""
    home = os.environ.get("WEFT_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".weft") / "store"


class Store:
    """What a server keeps.

    responses: of /v1/responses.  files, batches: of /v1/files and /v1/batches, in one database, since results become files.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_responses: int = MAX_RESPONSES,
        max_bytes: int = MAX_BYTES,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        """max_bytes: of the responses, and as much again of files and batches.  Raises ConfigError, see `open_store`."""
        self.folder = folder
        self._lock = _lock(folder)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, self._lock)
            self.responses = ResponseStore(folder / "responses.sqlite", max_responses, max_bytes)
            undo.callback(self.responses.close)
            self.files = FileStore(folder / "files.sqlite", FILES, max_bytes, max_file_bytes)
            self.batches = BatchStore(self.files)
            undo.pop_all()

    def close(self) -> None:
        """Finish what is being written, and let another server have the folder."""
        self.responses.close()
        self.files.close()
        os.close(self._lock)


def open_store(
    folder: Path | None = None,
    *,
    max_responses: int = MAX_RESPONSES,
    max_bytes: int = MAX_BYTES,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Store:
    """The store in a folder, made where it is not there; None is `default_folder()`.

    Raises ConfigError for a folder that cannot be written, that another server uses, or with files of another version.
    """
    return Store(
        folder or default_folder(), max_responses=max_responses, max_bytes=max_bytes, max_file_bytes=max_file_bytes
    )


def _lock(folder: Path) -> int:
    """A descriptor that holds the folder until it is closed, or until the process ends."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}); give another with --data-dir") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigError(f"another server keeps its data in {folder}; give a folder with --data-dir") from None
    return lock
