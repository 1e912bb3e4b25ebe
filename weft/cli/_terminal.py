"""What commands say beside their answer: sentences, tables and progress, all on stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from weft.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[int, int], None]
"""(done, in all), in bytes"""


LEVELS = ("debug", "info", "warning", "error")


def log(level: str) -> None:
    """Send what weft and its libraries log to stderr, from this level (one of LEVELS) on."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


def stderr() -> Console:
    """A console on stderr; where that is no terminal, lines are never folded."""
    from rich.console import Console

    return Console(stderr=True, highlight=False) if sys.stderr.isatty() else Console(stderr=True, width=200)


def stdout() -> Console:
    """A console on stdout; where that is no terminal, lines are never folded."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(width=200)


def say(text: str) -> None:
    """One line on stderr, as it is."""
    print(text, file=sys.stderr, flush=True)


def complain(text: str) -> None:
    """One sentence on stderr that says what went wrong."""
    sentence = " ".join(text.split())
    if sys.stderr.isatty():
        stderr().print("[bold red]error:[/]", end=" ")
        say(sentence)
    else:
        say(f"error: {sentence}")


@contextlib.contextmanager
def loading(name: str, doing: str = "loading", done_: str = "loaded", *, bytes_: bool = True) -> Iterator[Progress]:
    """Progress of loading weights, or something like it: a bar on a terminal, else a line before, one now and then if it is
    slow, one after.

    bytes_: whether what is counted are bytes.
    """
    began = time.monotonic()
    if sys.stderr.isatty():
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TransferSpeedColumn,
        )

        counted = (DownloadColumn(), TransferSpeedColumn()) if bytes_ else (TaskProgressColumn(),)
        columns = (TextColumn(doing + " {task.description}"), BarColumn(), *counted)
        with Progress(*columns, console=stderr(), transient=True) as bar:
            task = bar.add_task(name, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        say(f"{doing} {name}")
        last = began

        def line(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= 5 and done < total:
                last = time.monotonic()
                say(f"{doing} {name}: {100 * done // max(total, 1)} %")

        yield line
    say(f"{done_} {name} in {time.monotonic() - began:.1f} s")


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the given function say True, so that a step of the engine is never torn apart.

    The second one raises KeyboardInterrupt.
    """
    hits = 0

    def count(number: int, frame: object) -> None:
        nonlocal hits
        hits += 1
        if hits > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, count)
    try:
        yield lambda: hits > 0
    finally:
        signal.signal(signal.SIGINT, before)


def level(given: str | None) -> str:
    """The log level that a flag, or WEFT_LOG, names.  Raises ConfigError."""
    wanted = (given or os.environ.get("WEFT_LOG") or "warning").lower()
    if wanted not in LEVELS:
        raise ConfigError(f"the log level is one of {', '.join(LEVELS)}, got {wanted!r}")
    return wanted
