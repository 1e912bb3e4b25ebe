"""A driver as a process of its own: asked by lines of JSON, waited for at most so long, and ended by its own id."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

MAX_ANSWER_BYTES = 64 << 20
ENDING_S = 5.0
TAIL_LINES = 3
TAIL_BYTES = 4000


class RivalError(Exception):
    """An engine can't be measured; the text says why."""


class Driver:
    """One engine.  Use it as a context: its end is the end of the process and of all that the process started.

    argv: the driver's command.  env: added to this process's.  log: where its stderr goes.
    """

    def __init__(self, name: str, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as errors:
            # A session of its own, so that a terminal's Ctrl-C reaches it through us alone, and its children end with it.
            self.process = subprocess.Popen(
                list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
                env={**os.environ, **(env or {})},
            )  # fmt: skip
        self._rest = b""
        self._late = False

    def __enter__(self) -> Driver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Whoever is interrupted does not want to wait.
        self._late = self._late or kind is not None
        self.close()

    def ask(self, message: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Its answer.  Raises RivalError where it dies, is silent for `timeout_s`, answers with anything else, or says no."""
        what = str(message.get("do"))
        if self.process.poll() is not None:
            raise self._error(f"it had ended (exit status {self.process.returncode}) before {what}")
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died(what) from None
        line = self._line(what, timeout_s)
        try:
            answer = json.loads(line)
            good = answer["ok"]
        except (ValueError, TypeError, KeyError):
            self.close()
            raise self._error(f"its answer to {what} is not of the protocol: {line[:200]!r}") from None
        if good is not True:
            raise RivalError(str(answer.get("error", "it did not say why"))[:2000])
        return dict(answer)

    def close(self) -> None:
        """End the process; what doesn't go by itself is killed.  Twice does no harm."""
        process = self.process
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        try:
            if process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(ENDING_S if not self._late else 0)
        finally:
            kill_group(process)

    def _line(self, what: str, timeout_s: float) -> bytes:
        stdout = self.process.stdout
        assert stdout is not None
        until = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                left_s = until - time.monotonic()
                if left_s <= 0 or not selector.select(left_s):
                    self._late = True
                    self.close()
                    raise self._error(f"no answer to {what} within {timeout_s:g} s")
                some = os.read(stdout.fileno(), 1 << 16)
                if not some:
                    raise self._died(what)
                self._rest += some
                if len(self._rest) > MAX_ANSWER_BYTES:
                    self._late = True
                    self.close()
                    raise self._error(f"its answer to {what} has no end")
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _died(self, what: str) -> RivalError:
        self.close()
        status = self.process.returncode
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return self._error(f"it ended at {what} ({how})")

    def _error(self, text: str) -> RivalError:
        last = tail(self.log)
        return RivalError(f"{text}; its last words: {last}" if last else text)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a session, with everything in its group, and wait for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path) -> str:
    """The last lines of a log, in one."""
    with contextlib.suppress(OSError):
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = file.read().decode("utf8", "replace")
        return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-TAIL_LINES:])
    return ""


def run(
    argv: Sequence[str],
    log: Path,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    tick: Callable[[float], None] = lambda gone_s: None,
) -> None:
    """Run a command to its end, its output behind what `log` holds.  Raises RivalError; Ctrl-C ends it too.

    tick: called about once a second with the seconds that have gone.
    """
    began = time.monotonic()
    with open(log, "ab") as out:
        process = subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        try:
            while process.poll() is None:
                gone_s = time.monotonic() - began
                if gone_s > timeout_s:
                    raise RivalError(f"{' '.join(argv[1:4])} took more than {timeout_s:g} s: {tail(log)}")
                tick(gone_s)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(1.0, timeout_s))
        finally:
            kill_group(process)
    if status := process.returncode:
        raise RivalError(f"{' '.join(argv[1:4])} ended with exit status {status}: {tail(log)}")
