"""What commands say beside their answer: sentences, tables and progress, all on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from weft.errors import ConfigError
from weft.front.signals import signals

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[int, int], None]
"""(done, in all), in bytes"""


LEVELS = ("debug", "info", "warning", "error")


class JSONLines(logging.Formatter):
    """A line of JSON for each record: time, level, logger and message; of a request what `access` tells; an id within one."""

    def format(self, record: logging.LogRecord) -> str:
        from weft.front.access import TRACK

        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        told: dict[str, Any] = {"time": at, "level": record.levelname.lower(), "logger": record.name}
        track = TRACK.get()
        request = getattr(record, "request", None)
        if request is not None:
            told |= request
        else:
            told |= {"message": record.getMessage()} | ({"id": track.id} if track is not None else {})
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def log(level: str, form: str = "text") -> None:
    """Send what weft and its libraries log to stderr, from this level (one of LEVELS) on.  form: text or json."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JSONLines() if form == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler])


def stderr() -> Console:
    """A console on stderr; where that is no terminal, lines are never folded."""
    from rich.console import Console

    return Console(stderr=True, highlight=False) if sys.stderr.isatty() else Console(stderr=True, width=200)


def stdout() -> Console:
    """A console on stdout; where that is no terminal, lines are never folded."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(width=200)


def in_json() -> bool:
    """Whether stderr has lines of JSON and nothing else."""
    return any(isinstance(handler.formatter, JSONLines) for handler in logging.getLogger().handlers)


def say(text: str) -> None:
    """One line on stderr, as it is; a record where stderr has lines of JSON."""
    if in_json():
        logging.getLogger("weft.cli").info("%s", text)
    else:
        print(text, file=sys.stderr, flush=True)


def complain(text: str) -> None:
    """One sentence on stderr that says what went wrong."""
    sentence = " ".join(text.split())
    if in_json():
        logging.getLogger("weft.cli").error("%s", sentence)
    elif sys.stderr.isatty():
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
    if sys.stderr.isatty() and not in_json():
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


def level(given: str | None, usual: str = "warning") -> str:
    """The log level that a flag, or WEFT_LOG, names.  Raises ConfigError."""
    wanted = (given or os.environ.get("WEFT_LOG") or usual).lower()
    if wanted not in LEVELS:
        raise ConfigError(f"the log level is one of {', '.join(LEVELS)}, got {wanted!r}")
    return wanted


class Ended(KeyboardInterrupt):
    """A signal asked the command to end.

    Not KeyboardInterrupt itself: where that leaves an `exec` of text (every dataclass is made by one, so most imports have some),
    CPython notes it for good and ends the process by SIGINT after all, whatever status it was given
    (`run_eval_code_obj`, `Py_RunMain`).
    """


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """SIGTERM ends this as Ctrl-C does, so that nothing half made, and no process, is left behind."""

    def stop(number: int, frame: object) -> None:
        raise Ended

    with signals(stop):
        yield
