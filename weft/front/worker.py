"""`Worker`: a process for work that a stranger's input may make long or large; it may be killed at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from weft.errors import ConfigError

ENDS = {-signal.SIGPROF: "time", -signal.SIGABRT: "memory"}
"""What it means that a process ended by its own alarm, or by SIGABRT (a library that got no memory)."""


class Worker:
    """Runs a script that answers frames: 4 bytes big-endian length, then JSON, on stdin and on stdout.

    seconds: the script's own limit for one answer; its parent ends it some time later.  purpose: what error texts say it is for.
    life: counts the processes that were started.  Not thread-safe.
    """

    def __init__(self, script: Path, arguments: tuple[str, ...], *, seconds: float, purpose: str) -> None:
        self.life = 0
        self._command = [sys.executable, "-P", str(script), *arguments]
        self._seconds, self._purpose = seconds, purpose
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    @property
    def running(self) -> bool:
        return self._process is not None and self._owner == os.getpid() and self._process.poll() is None

    def start(self) -> None:
        """Start the process where none runs; does not wait for it.  Raises ConfigError where that is not possible."""
        self._started()

    def ask(self, request: bytes) -> dict[str, Any]:
        """One request and its answer.  A process that is gone or late is ended: {"error", "message"} with error one of time,
        memory and died; the last only where another process, too, ended on it: the first may have been killed from outside."""
        reply = self._ask(request)
        return self._ask(request) if reply.get("error") == "died" else reply

    def _ask(self, request: bytes) -> dict[str, Any]:
        process, over = self._started(), threading.Event()
        assert process.stdin is not None
        assert process.stdout is not None

        def end() -> None:
            over.set()
            process.kill()

        late = threading.Timer(self._seconds * 2 + 5.0, end)  # the worker's own alarm comes first
        late.daemon = True
        late.start()
        try:
            process.stdin.write(len(request).to_bytes(4, "big") + request)
            process.stdin.flush()
            head = process.stdout.read(4)
            body = process.stdout.read(int.from_bytes(head, "big")) if len(head) == 4 else b""
            if len(head) == 4 and len(body) == int.from_bytes(head, "big"):
                return _decoded(body)
        except (OSError, ValueError):
            pass
        finally:
            late.cancel()
        code = self.close()
        return {"error": "time" if over.is_set() else ENDS.get(code or 0, "died"), "message": f"exit status {code}"}

    def close(self) -> int | None:
        """Kill and reap the process; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            return process.wait(timeout=0.5)  # it ends by itself when its stdin closes
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self.running:
            return self._process
        if self._owner == os.getpid():
            self.close()
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as e:
            text = f"the process for {self._purpose} cannot be started ({e}); is {sys.executable} there?"
            raise ConfigError(text) from e
        self._process, self._owner = process, os.getpid()
        self.life += 1
        return process


def _decoded(body: bytes) -> dict[str, Any]:
    """An answer, the quick way; an escape of half a pair only the other one reads."""
    try:
        reply: dict[str, Any] = msgspec.json.decode(body)
    except msgspec.DecodeError:
        reply = json.loads(body)
    return reply
