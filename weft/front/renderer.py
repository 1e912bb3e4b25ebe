"""`Renderer`: the parent's side of the template worker, a process that may be killed at any moment."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from weft.errors import ConfigError, RequestError

_WORKER = Path(__file__).with_name("template_worker.py")


class Renderer:
    """Runs chat templates in a process of its own, one at a time, and starts a new one when it had to be ended.

    seconds: longest time for one template.  memory_bytes: address space of the worker.  max_chars: longest text.
    Thread-safe.  The worker ends when this process does, or at `close`.
    """

    def __init__(self, *, seconds: float = 5.0, memory_bytes: int = 1 << 30, max_chars: int = 16 << 20) -> None:
        self.seconds = seconds
        self.memory_bytes = memory_bytes
        self.max_chars = max_chars
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._known: set[str] = set()

    def start(self) -> None:
        """Start the worker ahead of its first use; does not wait for it."""
        with self._lock:
            self._running()

    def render(self, source: str, context: dict[str, Any], kwargs: dict[str, Any], known: list[str]) -> dict[str, Any]:
        """The worker's answer: {"text"} or {"error", "message"}; error "time" when it had to be ended.

        kwargs stand in the template's context below `context`; names that are neither in `known` nor read by the
        template are an error.  Raises RequestError for values that are not JSON.
        """
        key = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        request = {"key": key, "context": context, "kwargs": kwargs, "known": known}
        try:
            bare = json.dumps(request).encode()
        except (TypeError, ValueError, RecursionError) as e:
            raise RequestError(f"the conversation is not plain JSON ({e})", param="messages") from e
        with self._lock:
            self._running()
            if key in self._known:
                reply = self._exchange(bare)
                if reply.get("error") != "unknown":
                    return reply
            reply = self._exchange(json.dumps({**request, "source": source}).encode())
            if self._process is not None:
                self._known.add(key)
            return reply

    def close(self) -> None:
        """End the worker."""
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        process = self._process
        if process is not None and self._owner == os.getpid() and process.poll() is None:
            return process
        if self._owner == os.getpid():
            self._end()
        command = [sys.executable, "-P", str(_WORKER), str(self.memory_bytes), str(self.seconds), str(self.max_chars)]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as e:
            text = f"the process for chat templates cannot be started ({e}); is {sys.executable} there?"
            raise ConfigError(text) from e
        self._process, self._owner, self._known = process, os.getpid(), set()
        return process

    def _exchange(self, request: bytes) -> dict[str, Any]:
        """One request and its answer.  A worker that is gone or late is ended and reported."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Timer(self.seconds * 2 + 5.0, process.kill)  # the worker's own alarm comes first
        late.daemon = True
        late.start()
        try:
            process.stdin.write(len(request).to_bytes(4, "big") + request)
            process.stdin.flush()
            head = process.stdout.read(4)
            body = process.stdout.read(int.from_bytes(head, "big")) if len(head) == 4 else b""
            if len(head) == 4 and len(body) == int.from_bytes(head, "big"):
                reply: dict[str, Any] = json.loads(body)
                return reply
        except (OSError, ValueError):
            pass
        finally:
            late.cancel()
        code = self._end()
        return {"error": "time" if code is not None and code < 0 else "died", "message": f"exit status {code}"}

    def _end(self) -> int | None:
        """Kill and reap the worker; its exit status."""
        process, self._process, self._known = self._process, None, set()
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


_shared: Renderer | None = None
_shared_lock = threading.Lock()


def shared_renderer() -> Renderer:
    """The one that all models of this process use."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Renderer()
            atexit.register(_shared.close)
        return _shared
