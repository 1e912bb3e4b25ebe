"""A file that a command writes at its end, after long work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from weft.cli._terminal import unwinding
from weft.errors import ConfigError


@contextlib.contextmanager
def written(flag: str, path: Path | None) -> Iterator[Callable[[str], None]]:
    """What writes the file that `flag` names; nothing where it names none.  Raises ConfigError.

    What can't be written is better known before hours of work than after, so the file is there at once; and it goes again, where
    it was not there before, if nothing comes of the work.
    """
    if path is None:
        yield lambda text: None
        return
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {path}: there is no folder {path.parent}; make it, or name another file")
    before = path.exists()

    def write(text: str) -> None:
        nonlocal before
        try:
            path.write_text(text, encoding="utf8")
        except OSError as error:
            raise ConfigError(f"{flag} {path} cannot be written: {error}") from None
        before = True

    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be written: {error}") from None
    try:
        with unwinding():
            yield write
    finally:
        if not before:
            with contextlib.suppress(OSError):
                path.unlink()
