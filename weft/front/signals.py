"""Who takes SIGINT and SIGTERM for a while."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def signals(take: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """`take` is called with every SIGINT and SIGTERM; afterwards whoever took them before does so again.

    Python gives signals to its main thread alone: in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
