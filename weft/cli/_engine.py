"""The engine's side of `weft serve`: a nursery that has loaded what is slow to load, and forks one engine after another.

    python -m weft.cli._engine FOLDER SOCKET

Loading PyTorch takes seconds, so it is done once, in a process that then does nothing but fork when the front asks for an engine:
one that takes a dead one's place is there as soon as its weights are.  The nursery never computes, and starts no thread: a
fork of it is as good as a new process.  Whoever of the two loses the front's socket ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from msgspec import Struct

from weft.cli._terminal import in_json, loading, log, say, stderr
from weft.errors import CapacityError, ConfigError, EngineError
from weft.exec.host import settle
from weft.exec.record import Record, tap
from weft.exec.thread import EngineThread
from weft.front.wire import (
    Done,
    Exited,
    Failed,
    FrameError,
    Frames,
    Hello,
    Ready,
    Spawned,
    Start,
    Step,
    ToEngine,
    ToNursery,
    frame_of,
)
from weft.slots import Vocabulary
from weft.types import EngineFrame

CHUNK_BYTES = 1 << 18
MOST_BACKLOG = 4096
"""Commands that wait for the engine's next step; beyond them the socket is left unread until it has taken some in."""
PARENT_DIES = 1
"""PR_SET_PDEATHSIG of prctl(2): the signal that a process gets when its parent ends."""


def command() -> tuple[list[str], str]:
    """(what starts a nursery, the socket's path left out; where): where weft itself is, so that nothing else is imported."""
    return [sys.executable, "-m", "weft.cli._engine", os.getcwd()], str(Path(__file__).resolve().parents[2])


def main(folder: str, path: str) -> None:
    """Serve the front that listens on the socket `path`, until it is gone.  folder: what relative paths start from."""
    os.chdir(folder)
    front = os.getppid()
    if "WEFT_API_KEY" in os.environ:
        del os.environ["WEFT_API_KEY"]  # the front's business
    _shielded()
    wake, woken = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    sock = _connected(path)
    sock.sendall(frame_of(Hello(os.getpid(), engine=False)))
    _load()
    children: set[int] = set()
    with contextlib.suppress(ConnectionError):  # the front is gone
        _nurse(sock, path, (wake, woken), children)
    _bury(children)
    if os.getppid() != front:
        _sweep(path)


def _nurse(sock: socket.socket, path: str, pipe: tuple[int, int], children: set[int]) -> None:
    """Fork an engine whenever the front asks for one, and tell of those that end, until the front hangs up.

    path: of the socket, for the engines.  pipe: its first end is readable when a child has ended.  children: those that live.
    """
    frames: Frames[Any] = Frames(ToNursery)
    while True:
        ready, _, _ = select.select([sock.fileno(), pipe[0]], [], [])
        if pipe[0] in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(pipe[0], 1024)
            for pid, status in _ended():
                children.discard(pid)
                sock.sendall(frame_of(Exited(pid, status)))
        if sock.fileno() in ready:
            data = sock.recv(CHUNK_BYTES)
            if not data:
                return
            for _ in frames.feed(data):
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for handle in pipe:
                        os.close(handle)
                    sock.close()
                    _engine(path)
                children.add(pid)
                sock.sendall(frame_of(Spawned(pid)))


def _load() -> None:
    """What every engine imports.  Imports only: a thread of a library's would not outlive a fork."""
    import torch  # noqa: F401

    import weft.exec.build
    import weft.exec.desk
    import weft.exec.runner
    import weft.exec.shadow
    import weft.models.decoder  # noqa: F401


def _ended() -> Iterator[tuple[int, int]]:
    """(pid, status) of every engine that has ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        yield pid, os.waitstatus_to_exitcode(status)


def _bury(children: set[int]) -> None:
    """The front is gone: so are its engines."""
    for pid in children:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _sweep(path: str) -> None:
    """A front that was killed has left its socket behind."""
    with contextlib.suppress(OSError):
        os.unlink(path)
        os.rmdir(os.path.dirname(path))


def _shielded() -> None:
    """Whoever ends the server speaks to the front, which ends the engine when it is no longer needed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _mortal() -> None:
    """Die with the nursery, whatever one is at."""
    with contextlib.suppress(OSError, AttributeError):  # where there is no prctl, the socket's end has to do
        ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGKILL)


def _connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(path)
    return sock


# ---------------------------------------------------------------------------------------------- the engine


def _engine(path: str) -> NoReturn:
    """A fork of the nursery: build what the front says, and serve it.  Never returns."""
    status = 1
    try:
        _mortal()
        sock = _connected(path)
        sock.sendall(frame_of(Hello(os.getpid(), engine=True)))
        status = serve(sock)
    except (BrokenPipeError, ConnectionError):  # the front is gone
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def serve(sock: socket.socket) -> int:
    """Build an engine on what comes first over the socket, then serve it until the socket or the engine ends; an exit status."""
    inbox = Inbox(sock)
    start = inbox.next()
    if not isinstance(start, Start):
        raise FrameError(f"an engine is told first what to build, and got {type(start).__name__}")
    if start.cpus:
        with contextlib.suppress(OSError, AttributeError):  # where threads cannot be held to cores, they share them
            os.sched_setaffinity(0, start.cpus)
    inbox.follow()
    try:
        port = _built(start)
    except EngineError as error:
        kind = (
            "capacity" if isinstance(error, CapacityError) else "config" if isinstance(error, ConfigError) else "engine"
        )
        _send(sock, Failed(str(error), kind))  # type: ignore[arg-type]
        return 1
    except Exception as error:
        sys.excepthook(*sys.exc_info())
        _send(sock, Failed(f"{type(error).__name__}: {error}"))
        return 1

    def tell(frame: EngineFrame) -> None:
        """On the engine's own thread, so that it waits while the front does not read, and holds nothing."""
        reason = port.error()
        try:
            _send(sock, Step(frame) if reason is None else Failed(reason))
        except OSError:  # the front is gone
            os._exit(0)
        if reason is not None:  # what lives is not lost: the front asks the next engine for it
            inbox.end()

    if isinstance(port.engine.tap, Record):
        inbox.closing = port.engine.tap.close
    port.subscribe(tell)
    _send(sock, Ready(port.info))
    inbox.serve(port)
    port.close()
    return 1


def _send(sock: socket.socket, message: Struct) -> None:
    sock.sendall(frame_of(message))


class Inbox:
    """Reads the socket, from `follow` on in a thread, so that a front that dies ends the engine at once, whatever it is at."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames: Frames[Any] = Frames(ToEngine)
        self._held: deque[Any] = deque()
        self._port: EngineThread | None = None
        self._turn = threading.Lock()
        self._over = threading.Event()
        self.closing: Callable[[], None] = lambda: None
        """Called when the front says that the server ends."""

    def next(self) -> Any:
        """The next message, before `follow`."""
        while not self._held:
            self._read()
        return self._held.popleft()

    def follow(self) -> None:
        threading.Thread(target=self._follow, name="weft-inbox", daemon=True).start()

    def serve(self, port: EngineThread) -> None:
        """Give what has come to the engine, and let the thread do so with what comes, until `end`."""
        with self._turn:
            while self._held:
                port.send(self._held.popleft())
            self._port = port
        self._over.wait()

    def end(self) -> None:
        self._over.set()

    def _follow(self) -> None:
        try:
            while True:
                self._read()
                while self._backlog > MOST_BACKLOG:
                    time.sleep(0.001)
        except (EOFError, OSError):
            os._exit(0)
        except FrameError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    @property
    def _backlog(self) -> int:
        return len(self._held) if self._port is None else self._port.backlog

    def _read(self) -> None:
        data = self._sock.recv(CHUNK_BYTES)
        if not data:
            raise EOFError
        messages = self._frames.feed(data)
        with self._turn:
            give = self._held.append if self._port is None else self._port.send
            for message in messages:
                if isinstance(message, Done):
                    self.closing()
                else:
                    give(message)


def _built(start: Start) -> EngineThread:
    """Plan, show the plan, and only then load.  Raises EngineError."""
    from weft.exec.build import build, engine_config, prepare
    from weft.exec.shadow import Shadow, check_options, planned
    from weft.llm import engine_info

    log(start.log_level, start.log_format)
    setup = prepare(engine_config(Path(start.folder), start.options), shared=start.shared)
    if start.shadow is not None:
        check_options(*start.shadow)
        setup = planned(setup)
    if start.quiet:
        setup.require_fit()
        runtime = build(setup, vocabulary=_vocabulary(start), vocabulary_of=_vocabulary_of)
    else:
        runtime = _shown(setup, start)
    if start.record is not None:
        tap(runtime.engine, _free(start.record) if start.quiet else Path(start.record))
    shadow = None if start.shadow is None else Shadow(runtime, *start.shadow)
    info = engine_info(setup, start.name, runtime.adapters, loads_adapters=start.lora_root is not None)
    settle()
    return EngineThread(
        runtime.engine, runtime.executor, info, adapters=runtime.adapters, adapter_root=start.lora_root, shadow=shadow,
        foretell=True,
    )  # fmt: skip


def _free(record: str) -> Path:
    """FILE.2, or the first of its kind that is not there."""
    return next(path for n in itertools.count(2) if not (path := Path(f"{record}.{n}")).exists())


def _shown(setup: Any, start: Start) -> Any:
    """A built engine, with its plan and progress on stderr."""
    from weft.cli.plan import as_json, table
    from weft.exec.build import build
    from weft.exec.host import format_size
    from weft.ops.choice import slower

    if in_json():
        say(f"memory plan of {start.name}: {json.dumps(as_json(setup, start.name))}")
    else:
        stderr().print(table(setup, start.name))
    setup.require_fit()
    if setup.plan.reason:
        say(f"note: {setup.plan.reason}")
    if note := slower(setup.ops["target"], setup.config.ops, setup.device):
        say(f"note: {note}")
    with loading(f"{format_size(setup.plan.weights_bytes)} of weights") as progress:
        return build(setup, progress, vocabulary=_vocabulary(start), vocabulary_of=_vocabulary_of)


def _vocabulary(start: Start) -> Callable[[], Vocabulary]:
    """What reads the model's tokenizer, when a request first asks for a grammar."""

    def read() -> Vocabulary:
        from weft.front.text import ModelText

        return ModelText.load(Path(start.folder), name=start.name).vocabulary()

    return read


def _vocabulary_of(folder: Path) -> Vocabulary:
    from weft.front.text import vocabulary_of

    return vocabulary_of(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
