"""Random ids."""

from __future__ import annotations

import os
import threading

READ_BYTES = 1 << 13
_lock = threading.Lock()
_unused = bytearray()


def random_bytes(size: int) -> bytes:
    """Random bytes that nobody guesses, read from the system many at once.

    To ask it gives Python's lock away.  An answer may hold tens of thousands of calls, each with an id of its own, and a thread
    that gives the lock away and takes it back every few microseconds leaves it to others too briefly for them to wake up.
    """
    with _lock:
        if len(_unused) < size:
            _unused.extend(os.urandom(READ_BYTES + size))
        taken = bytes(_unused[-size:])
        del _unused[-size:]
        return taken
