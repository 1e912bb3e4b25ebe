"""One end of a socket to the engine or its nursery: never blocks, keeps what the other side has not read yet."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from msgspec import Struct

from weft.errors import EngineError
from weft.front.wire import Done, FrameError, Frames, Hello, frame_of

log = logging.getLogger("weft.engine")

CHUNK_BYTES = 1 << 18
MOST_UNREAD_BYTES = 1 << 30
"""What is kept for a process that does not read: more than all requests that a server lets in at once."""


class Link:
    """kind: the union of messages that come in."""

    def __init__(self, sock: socket.socket, kind: Any) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._frames: Frames[Any] = Frames(kind)
        self._unread = bytearray()

    @property
    def behind(self) -> bool:
        """Whether something waits to be read by the other side."""
        return bool(self._unread)

    def send(self, message: Struct) -> None:
        """Raises EngineError where the other side has left too much unread."""
        self._unread += frame_of(message)
        if len(self._unread) > MOST_UNREAD_BYTES:
            raise EngineError(f"the engine leaves {len(self._unread)} bytes of commands unread")
        self.flush()

    def flush(self) -> None:
        """Write what the socket takes; a side that is gone is found when it is read from."""
        try:
            while self._unread:
                del self._unread[: self.sock.send(self._unread)]
        except BlockingIOError:
            pass
        except OSError:
            self._unread.clear()

    def read(self) -> tuple[list[Any], bool]:
        """(messages that have come, whether the other side is still there).  Raises FrameError."""
        found: list[Any] = []
        while True:
            try:
                data = self.sock.recv(CHUNK_BYTES)
            except BlockingIOError:
                return found, True
            except OSError:
                return found, False
            if not data:
                return found, False
            found += self._frames.feed(data)
            if len(data) < CHUNK_BYTES:
                return found, True

    def hello(self) -> Hello | None:
        """Who the other side says it is; None where what comes first says nothing of that."""
        try:
            messages, there = self.read()
        except FrameError as error:
            log.error("a stranger on the engine's socket: %s", error)
            return None
        first = messages[0] if messages and there else None
        return first if isinstance(first, Hello) else None

    @property
    def readable(self) -> bool:
        """Whether something, or the end, waits to be read."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.sock, selectors.EVENT_READ)
            return bool(selector.select(0))

    def close(self, done: bool = False) -> None:
        """done: an engine is told first that the server ends in good order."""
        if done:
            self.send(Done())
        self.sock.close()


def kill(pid: int, after_s: float = 0.0) -> None:
    """End a process that may have ended already, or does so by itself within `after_s`; somebody else buries it."""
    until = time.monotonic() + after_s
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.kill(pid, 0)
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait so long for a process that is about to end, then end it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        if seconds:
            process.wait(seconds)
    process.kill()
    process.wait()


class Bell:
    """Wakes a thread that waits on a selector; may be rung from any thread, and after its end too."""

    def __init__(self) -> None:
        self._here, self._there = os.pipe()
        os.set_blocking(self._here, False)
        os.set_blocking(self._there, False)

    def fileno(self) -> int:
        return self._here

    def ring(self) -> None:
        with contextlib.suppress(OSError):  # it rings already, or nobody is left to hear it
            os.write(self._there, b"x")

    def hush(self) -> None:
        with contextlib.suppress(OSError):
            os.read(self._here, 4096)

    def close(self) -> None:
        here, there = self._here, self._there
        self._here = self._there = -1
        os.close(here)
        os.close(there)


class Door:
    """The socket on which engine and nursery are awaited: mode 0600, in a folder of its own of mode 0700."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="weft-"))
        self.path = str(self.folder / "engine")
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self.sock.bind(self.path)
        finally:
            os.umask(before)
        self.sock.listen(8)
        self.sock.setblocking(False)

    def accept(self) -> socket.socket | None:
        """Whoever has come, None where it is another user's process, or gone again."""
        try:
            sock, _ = self.sock.accept()
        except OSError:
            return None
        if hasattr(socket, "SO_PEERCRED"):
            size = struct.calcsize("3i")
            _, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
            if user not in (0, os.getuid()):
                sock.close()
                return None
        return sock

    def close(self) -> None:
        self.sock.close()
        Path(self.path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()
