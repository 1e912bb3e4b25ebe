"""`RemoteEngine`: an engine in a process of its own, watched, started again when it dies or stalls, and given what it had.

One thread looks after the journal, the sockets and the processes, and calls the sink.  A command is written down and sent on by
whoever gives it, unless the thread has its turn just then: to wake it would cost each request a part of a millisecond.
"""

from __future__ import annotations

import logging
import selectors
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from msgspec import structs

from weft.errors import EngineError
from weft.front.entry import Entry
from weft.front.journal import Journal
from weft.front.link import Bell, Door, Link, end, kill
from weft.front.metrics import total
from weft.front.port import STOPPED, EngineInfo, EngineState, FrameSink
from weft.front.wire import Exited, Failed, FrameError, FromEngine, FromNursery, Ready, Spawn, Spawned, Start, Step
from weft.types import Command, EngineFrame, EngineStats, Seen

log = logging.getLogger("weft.engine")

STALL_S = 120.0
"""Seconds without a step, work waiting, after which an engine is replaced."""
REQUEST_STALL_S = 120.0
"""Seconds after which a request that does not advance, while the engine steps, is computed again."""
TICK_S = 0.25
MOST_PATIENCE = 8.0
"""How often that time an engine gets whose like have stood still without giving a token."""
MOST_STARTS = 5
"""Engines in a row that do not come up, after which there is no use in another one."""
LONGEST_WAIT_S = 30.0
CLOSING_S = 2.0


class RemoteEngine:
    """An `EnginePort` over engine processes.  command: starts the nursery in `cwd`, and gets the socket's path as last argument.

    start: what every engine builds.  stall_s: seconds without a step after which an engine that has work is replaced.
    request_stall_s: seconds after which a request that does not advance in an engine that steps is computed again.  of: the model
    that the log names, where there are several.
    `started` is done once the first engine is up, or with the error that it cannot be built.
    """

    def __init__(
        self, command: Sequence[str], start: Start, *, cwd: str | None = None, stall_s: float = STALL_S,
        request_stall_s: float = REQUEST_STALL_S, of: str = "",
    ) -> None:  # fmt: skip
        self._command, self._cwd, self._start = list(command), cwd, start
        self._name = f"the engine of {of}" if of else "the engine"
        self._fds = () if start.shared is None else (start.shared.fd,)
        self._stall_s, self._request_stall_s = stall_s, request_stall_s
        self._looked = 0.0
        self.started: Future[EngineInfo] = Future()
        self._stats = self._before = EngineStats()
        self._error: str | None = None
        self._status: EngineState = EngineState(status="loading", reason="the engine is being loaded")
        self._sink: FrameSink | None = None
        self._commands: deque[Command | Entry] = deque()
        self._turn = threading.Lock()  # of whoever is at what is below; nobody but the thread waits for it
        self._closing = self._up = self._spawning = False
        self._journal = Journal()
        self._restarts = self._failures = 0
        self._patience = 1.0
        self._pid: int | None = None
        self._gone: int | None = None
        self._why, self._in_words = "", False
        self._engine: Link | None = None
        self._moved = 0.0
        """When the engine last gave a sign, or got work after having had none."""
        self._stepped: float | None = None
        self._again_at: float | None = None
        self._nursery: Link | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._door = Door()
        self._selector = selectors.DefaultSelector()
        self._bell = Bell()
        self._selector.register(self._bell, selectors.EVENT_READ, self._commanded)
        self._selector.register(self._door.sock, selectors.EVENT_READ, self._knocked)
        self._thread = threading.Thread(target=self._run, name="weft-engine-link", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ the port

    @property
    def info(self) -> EngineInfo:
        """Raises what kept the first engine from being built; waits for it."""
        return self.started.result()

    @property
    def stats(self) -> EngineStats:
        return self._stats

    def send(self, command: Command | Entry) -> None:
        """A command, or a request that another engine had and that this one goes on with."""
        self._commands.append(command)
        if self._turn.acquire(blocking=False):
            try:
                self._take_in()
                if self._engine is None or not self._engine.behind:
                    return
            finally:
                self._turn.release()
        self._bell.ring()

    def subscribe(self, sink: FrameSink) -> None:
        self._sink = sink

    def stalled_s(self) -> float:
        return time.monotonic() - self._moved if self._up and self._journal.busy else 0.0

    def error(self) -> str | None:
        return self._error

    def state(self, stall_s: float) -> EngineState:
        """How it is now.  stall_s: seconds without a step from which on it counts as stalled."""
        last = None if self._stepped is None else time.monotonic() - self._stepped
        state = replace(self._status, pid=self._pid, restarts=self._restarts, last_step_s=last)
        stalled = self.stalled_s()
        if state.status == "ok" and stalled > stall_s:
            return replace(state, status="stalled", reason=f"no token for {stalled:.0f} s while requests wait")
        return state

    @property
    def away(self) -> bool:
        """Whether there is no engine now: it is being started, or has ended for good."""
        return not self._up

    def left_over(self) -> list[Entry]:
        """What one that has ended for good had, to be sent to another."""
        return list(self._journal.entries.values())

    def close(self) -> None:
        """End engine and nursery; what lives is dropped."""
        self._closing = True
        self._bell.ring()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2 * CLOSING_S)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            with self._turn:
                self._spawn()
            while not self._closing and self._error is None:
                heard = self._selector.select(self._wait_s())
                with self._turn:
                    for key, mask in heard:
                        key.data(write=bool(mask & selectors.EVENT_WRITE))
                    self._look(any(key.data == self._from_engine for key, _ in heard))
        except BaseException as error:
            log.exception("%s: its supervisor has failed", self._name)
            self._give_up(EngineError(f"the engine's supervisor has failed ({type(error).__name__}: {error})"))
        finally:
            with self._turn:
                self._end()

    def _wait_s(self) -> float:
        return TICK_S if self._again_at is None else min(TICK_S, max(0.0, self._again_at - time.monotonic()))

    def _look(self, heard: bool) -> None:
        """What only time tells: a nursery that has ended, an engine that stands still, the moment to try again.  heard: the
        engine has said something; who was asleep oneself has to listen before saying that it stands still."""
        now = time.monotonic()
        if self._again_at is not None and now >= self._again_at:
            self._again_at = None
            self._spawn()
        if self._nursery is None and self._process is not None and self._process.poll() is not None:
            self._lost(f"its nursery ended with status {self._process.returncode}")
        if self._up and now - self._looked >= TICK_S:
            self._looked = now
            events, commands = self._journal.overdue(now, self._request_stall_s)
            if commands:
                log.warning("%s: requests did not advance for %g s; taken back", self._name, self._request_stall_s)
            self._tell(commands)
            self._emit(events)
        if not heard and self._up and self._journal.busy and now - self._moved > self._stall_s * self._patience:
            self._patience = min(2 * self._patience, MOST_PATIENCE)  # a step that is only slow gets through in the end
            self._kill(f"it made no step for {now - self._moved:.0f} s")

    def _commanded(self, write: bool = False) -> None:
        self._bell.hush()
        self._take_in()
        self._watch_writes()

    def _take_in(self) -> None:
        """Write down what was asked, and send it on."""
        while self._commands:
            idle = not self._journal.busy
            self._write(self._journal.command(self._commands.popleft()))
            if idle:
                self._moved = time.monotonic()

    def _tell(self, commands: list[Command]) -> None:
        self._write(commands)
        self._watch_writes()

    def _write(self, commands: list[Command]) -> None:
        try:
            for command in commands if self._engine is not None else ():
                self._engine.send(command)  # type: ignore[union-attr]
        except EngineError as error:
            self._kill(str(error))

    def _watch_writes(self) -> None:
        link = self._engine
        if link is not None:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.behind else 0)
            if self._selector.get_key(link.sock).events != wanted:
                self._selector.modify(link.sock, wanted, self._from_engine)

    # ------------------------------------------------------------------ processes come and go

    def _spawn(self) -> None:
        """Ask for an engine, and for a nursery first where there is none."""
        if self._process is None:
            self._process = subprocess.Popen(
                [*self._command, self._door.path], stdin=subprocess.DEVNULL, stdout=2, cwd=self._cwd, pass_fds=self._fds
            )
            self._spawning = True
        elif self._nursery is not None:
            self._nursery.send(Spawn())
        else:
            self._spawning = True

    def _knocked(self, write: bool = False) -> None:
        """Somebody has connected: its first message says who."""
        sock = self._door.accept()
        if sock is None:
            return
        link = Link(sock, FromEngine | FromNursery)

        def greeted(write: bool = False) -> None:
            self._selector.unregister(sock)
            hello = link.hello()
            if hello is None:
                link.close()
            elif hello.engine:
                self._meet_engine(link, hello.pid)
            else:
                self._meet_nursery(link)

        self._selector.register(sock, selectors.EVENT_READ, greeted)

    def _meet_nursery(self, link: Link) -> None:
        self._nursery = link
        self._selector.register(link.sock, selectors.EVENT_READ, self._from_nursery)
        if self._spawning:
            self._spawning = False
            link.send(Spawn())

    def _meet_engine(self, link: Link, pid: int) -> None:
        if self._engine is not None or pid == self._gone:
            link.close()
            return
        self._engine, self._pid = link, pid
        self._selector.register(link.sock, selectors.EVENT_READ, self._from_engine)
        link.send(self._again(self.started.result()) if self.started.done() else self._start)
        self._watch_writes()

    def _again(self, info: EngineInfo) -> Start:
        """What an engine builds that takes another's place: no shorter context, however much memory there is by now."""
        options = {**self._start.options, "max_model_len": info.max_model_len}
        return structs.replace(self._start, options=options, quiet=True)

    def _from_nursery(self, write: bool = False) -> None:
        if self._nursery is None:
            return
        messages, there = self._nursery.read()
        for message in messages:
            if isinstance(message, Spawned):
                self._pid = message.pid
            elif isinstance(message, Exited) and message.pid == self._pid:
                self._died(message.status)
        if not there:
            self._lost("its nursery is gone")

    def _from_engine(self, write: bool = False) -> None:
        link = self._engine
        if link is None:  # what was heard before it in the same round has ended it
            return
        if write:
            link.flush()
            self._watch_writes()
            return
        try:
            messages, there = link.read()
        except FrameError as error:
            self._kill(f"it sent what is no message: {error}")
            return
        for message in messages:
            self._hear(message)
        if not there and self._engine is link:
            self._drop_engine()
            if self._pid is not None and self._nursery is not None:
                kill(self._pid)  # an engine without a socket is of no use; its nursery tells when it has ended

    def _hear(self, message: Any) -> None:
        if isinstance(message, Step):
            self._stepped = self._moved = time.monotonic()
            frame = message.frame
            self._stats = total(self._before, frame.stats, self._restarts)
            events, commands = self._journal.take(frame)
            if frame.events:
                self._failures, self._patience = 0, 1.0
            self._tell(commands)
            seen = None if frame.seen is None else self._journal.shown(frame.seen)
            self._emit(events, self._journal.begun, seen)
        elif isinstance(message, Ready):
            self._begin(message.info)
        elif isinstance(message, Failed):
            self._why, self._in_words = message.message, True
            if not self.started.done():
                self._give_up(message.error)

    def _begin(self, info: EngineInfo) -> None:
        self._up, self._moved, self._why = True, time.monotonic(), ""
        self._status = EngineState()
        self._tell(self._journal.begin(info.stack))
        if not self.started.done():
            self.started.set_result(info)

    def _emit(self, events: list[Any], begun: tuple[int, ...] = (), seen: Seen | None = None) -> None:
        if (events or begun or seen is not None) and self._sink is not None:
            self._sink(EngineFrame(events=tuple(events), stats=self._stats, plan=begun or None, seen=seen))

    # ------------------------------------------------------------------ the end of an engine

    def _kill(self, why: str) -> None:
        """End an engine that cannot go on; that it has ended is told by its nursery."""
        self._why = self._why or why
        log.warning("%s is ended: %s", self._name, why)
        if self._pid is not None:
            kill(self._pid)

    def _drop_engine(self, done: bool = False) -> None:
        if self._engine is not None:
            self._selector.unregister(self._engine.sock)
            self._engine.close(done)
            self._engine = None

    def _died(self, status: int) -> None:
        """The engine has ended: read what it still said, and ask for another one."""
        self._pid, self._gone = None, self._pid
        while self._engine is not None:
            before = self._engine
            self._from_engine()
            if self._engine is before and not before.readable:
                self._drop_engine()
        if self._error is not None:
            return
        reason = self._why or (f"signal {-status} ended it" if status < 0 else f"it ended with status {status}")
        told = "the server's log says why" if self._in_words else reason
        was_up, self._up, self._why, self._in_words = self._up, False, "", False
        if not self.started.done():
            self._give_up(EngineError(f"the engine could not be started: {reason}"))
            return
        self._restarts, self._before = self._restarts + 1, self._stats
        self._stats = total(self._before, EngineStats(), self._restarts)  # nothing runs, and no block is held
        log.warning("%s died (%s) and is started again", self._name, reason)
        if was_up:
            self._emit(self._journal.died(reason))
        # Engines that do not even come up, or that die before any token, are given time.
        self._failures += 1
        if self._failures >= MOST_STARTS and not was_up:
            self._give_up(EngineError(f"the engine cannot be started again: {reason}"))
            return
        wait_s = min(LONGEST_WAIT_S, 0.25 * 2 ** (self._failures - 3)) if self._failures > 2 else 0.0
        self._status = EngineState(status="loading", reason=f"the engine died ({told}) and is being started again")
        self._again_at = time.monotonic() + wait_s

    def _lost(self, why: str) -> None:
        """The nursery is gone, and its engine with it."""
        if self._nursery is not None:
            self._selector.unregister(self._nursery.sock)
            self._nursery.close()
            self._nursery = None
        if self._process is not None:
            end(self._process, 0.0)
            self._process = None
        if self._pid is not None:
            kill(self._pid)
        self._why = self._why or why
        self._died(1)

    def _give_up(self, error: EngineError) -> None:
        self._error = str(error)
        self._status = EngineState(status="stalled", reason=STOPPED)
        if self.started.done():
            log.error("%s has stopped for good: %s", self._name, error)
        else:
            self.started.set_exception(error)

    def _end(self) -> None:
        """End what runs, and clear away the socket."""
        self._up = False
        self._drop_engine(done=True)  # which ends the engine
        if self._pid is not None:  # one that keeps a record writes its end
            kill(self._pid, CLOSING_S / 2 if self._start.record else 0.0)
        if self._nursery is not None:
            self._nursery.close()
        self._door.close()
        if self._process is not None:
            end(self._process, 0.0 if self._pid is None else CLOSING_S)  # the engine, if there is one, it has to bury
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]  # the bell, the door, and whoever has not said yet who it is
        self._selector.close()
        if not self.started.done():
            self.started.set_exception(EngineError("the engine was ended before it was loaded"))
