"""`Renderer`: the parent's side of the template worker, a process that may be killed at any moment."""

from __future__ import annotations

import atexit
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import msgspec

from weft.errors import RequestError
from weft.front.worker import Worker

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
        arguments = (str(memory_bytes), str(seconds), str(max_chars))
        self._worker = Worker(_WORKER, arguments, seconds=seconds, purpose="chat templates")
        self._known: set[str] = set()
        self._life = 0

    def start(self) -> None:
        """Start the worker ahead of its first use; does not wait for it."""
        with self._lock:
            self._worker.start()

    def render(self, source: str, context: dict[str, Any], kwargs: dict[str, Any], known: list[str]) -> dict[str, Any]:
        """The worker's answer: {"text"} or {"error", "message"}; error "time" when it had to be ended.

        kwargs stand in the template's context below `context`; names that are neither in `known` nor read by the
        template are an error.  Raises RequestError for values that are not JSON.
        """
        key = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        request = {"key": key, "context": context, "kwargs": kwargs, "known": known}
        try:
            bare = _encoded(request)
        except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as e:
            raise RequestError(f"the conversation is not plain JSON ({e})", param="messages") from e
        with self._lock:
            self._worker.start()
            if self._worker.life != self._life:
                self._known, self._life = set(), self._worker.life
            if key in self._known:
                reply = self._worker.ask(bare)
                if reply.get("error") != "unknown":
                    return reply
            reply = self._worker.ask(_encoded({**request, "source": source}))
            if self._worker.running and self._worker.life == self._life:
                self._known.add(key)
            return reply

    def close(self) -> None:
        """End the worker."""
        with self._lock:
            self._worker.close()


def _encoded(request: dict[str, Any]) -> bytes:
    """As JSON, many times faster than by the module json, which nothing else runs beside; half a pair only that can write."""
    try:
        return msgspec.json.encode(request)
    except UnicodeEncodeError:
        return json.dumps(request).encode()


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
