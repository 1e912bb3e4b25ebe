"""A listener on this machine that only notes who connects: what a server must never do because a client named an address."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class Canary:
    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.visits = 0
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    @property
    def addresses(self) -> list[str]:
        """The same place in spellings that parsers disagree about."""
        here = f"127.0.0.1:{self.port}"
        return [
            f"http://{here}/a.png", f"http://localhost:{self.port}/", f"http://example.com\\@{here}/",
            f"http://example.com@{here}/", f"http://[::ffff:127.0.0.1]:{self.port}/", f"http://2130706433:{self.port}/",
            f"//{here}/a", "file:///etc/passwd", f"http://{here}#.example.com",
        ]  # fmt: skip

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                visitor, _ = self._socket.accept()
                self.visits += 1
                visitor.close()


@contextlib.contextmanager
def canary() -> Iterator[Canary]:
    """Fails where anybody came."""
    made = Canary()
    try:
        yield made
        assert made.visits == 0, "the server connected to an address that a client named"
    finally:
        made.close()
