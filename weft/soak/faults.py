"""The faults of a soak.  Each is done to the processes of a server from outside; nothing in the server knows of them.

engine   the engine is killed
socket   the connection between front and engine is cut
stall    the engine stands still, until the front takes note
client   a client hangs up in the middle of its stream
slow     a client takes long to read
disk     no file of the server may grow, while files are uploaded and a batch is worked on (`soak.disk`)

One that is done to the engine's process is an entry of `TO_ENGINE`, one that a client makes a name in `BY_CLIENT`, one that is
done to what a server keeps a name in `TO_STORE`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

PIDFD_OPEN, PIDFD_GETFD = 434, 438
"""Numbers of the system calls, the same on all machines that have them."""
ROOM_BYTES = 64 << 10
"""Beyond which a write into a file fails while the disk is full; logs stay below it."""


class Impossible(Exception):
    """This machine does not allow it."""


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stall(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def cut(pid: int) -> None:
    """Shut down the unix socket of a process, which is its own, through a second handle on it (pidfd_getfd(2)).

    Raises Impossible where the system does not let one have it.
    """
    system = ctypes.CDLL(None, use_errno=True)
    process = system.syscall(PIDFD_OPEN, pid, 0)
    if process < 0:
        raise Impossible("pidfd_open")
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if not os.readlink(entry).startswith("socket:"):
                continue
            handle = system.syscall(PIDFD_GETFD, process, int(entry.name), 0)
            if handle < 0:
                raise Impossible(f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
            with socket.socket(fileno=handle) as found:
                if found.family == socket.AF_UNIX:
                    found.shutdown(socket.SHUT_RDWR)
                    return
    finally:
        os.close(process)
    raise Impossible("the engine has no socket")


@contextlib.contextmanager
def full(pid: int) -> Iterator[None]:
    """Meanwhile the kernel refuses every write of the process beyond `ROOM_BYTES` of a file (prlimit(2), RLIMIT_FSIZE).

    Raises Impossible where the system does not let one say so.
    """
    if not hasattr(resource, "prlimit"):
        raise Impossible("there is no prlimit here")
    try:
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (ROOM_BYTES, before[1]))
    except OSError as error:
        raise Impossible(f"prlimit: {error.strerror}") from None
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


TO_ENGINE: dict[str, Callable[[int], None]] = {"engine": kill, "socket": cut, "stall": stall}
"""Faults that are done to the engine's process."""
BY_CLIENT = ("client", "slow")
"""Faults that a request's own client makes."""
TO_STORE = ("disk",)
"""Faults of what a server keeps."""
ALL = (*TO_ENGINE, *BY_CLIENT, *TO_STORE)
