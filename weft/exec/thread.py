"""The engine in a thread of its own: commands in, one frame out for each step.  What `front.port.EnginePort` describes.

The only place that reads a clock for the engine.  Nothing but msgspec structs crosses the border.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from weft.core.engine import Engine
from weft.errors import EngineError
from weft.exec.grammars import GrammarDesk, Ready
from weft.types import (
    Adapted,
    Add,
    Cancel,
    Command,
    Drop,
    EngineFrame,
    EngineStats,
    Event,
    Finished,
    Load,
    Plan,
    RequestSpec,
    Seen,
    StepResult,
    Watch,
)

if TYPE_CHECKING:
    from weft.exec.adapters import AdapterBook
    from weft.exec.desk import AdapterDesk, Read
    from weft.exec.shadow import Shadow

SHOWN_S = 0.25
"""Between two looks at the blocks of the pool, while somebody watches."""
EMPTY_STEPS = 1000
"""Steps without any work, while requests live, after which the engine says that it is stuck."""


class Executor(Protocol):
    """Carries out plans; see `exec.runner` and `exec.null`."""

    def execute(self, plan: Plan) -> StepResult: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class StepTimes:
    """Seconds of one step.  host: everything that is neither model forward nor sampling."""

    total_s: float
    forward_s: float
    sample_s: float

    @property
    def host_s(self) -> float:
        return max(0.0, self.total_s - self.forward_s - self.sample_s)


def step(
    engine: Engine,
    executor: Executor,
    clock: Callable[[], float] = time.monotonic,
    planned: Callable[[Plan, list[Event]], None] | None = None,
) -> tuple[list[Event], StepTimes]:
    """One schedule, execute, commit.  planned: given the plan and its events before it is carried out; they are not returned."""
    began = clock()
    plan, events = engine.schedule(began)
    if planned is not None:
        planned(plan, events)
        events = []
    try:
        result = executor.execute(plan)
    except BaseException:  # an interrupt, say: the engine must not be left with a plan that never commits
        engine.abandon(plan, clock())
        raise
    events = [*events, *engine.commit(clock(), plan, result)]
    return events, StepTimes(clock() - began, result.forward_s, result.sample_s)


def _desk(adapters: AdapterBook, root: str | None, done: Callable[[Read], None]) -> AdapterDesk:
    from weft.exec.desk import AdapterDesk  # brings torch along, which an engine without a model does without

    return AdapterDesk(adapters, root, done)


class EngineThread:
    """info: `front.port.EngineInfo` for those who ask.  adapters: the engine's book; adapter_root: the folder below which it
    reads on command, None for none.  shadow: checks of a sample of the requests, or None.  The thread closes the executor when it
    ends.

    foretell: every step gives a frame, before its plan is carried out, with the requests in it and the events since the last one:
    so it is known what the engine was at should its process die.
    """

    def __init__(
        self,
        engine: Engine,
        executor: Executor,
        info: Any,
        *,
        idle_check: bool = True,
        adapters: AdapterBook | None = None,
        adapter_root: str | None = None,
        shadow: Shadow | None = None,
        foretell: bool = False,
    ) -> None:
        self.engine, self.executor, self._info, self.shadow = engine, executor, info, shadow
        self.idle_check, self.foretell = idle_check, foretell
        self._host_s = 0.0
        self._planned: tuple[int, ...] | None = None
        self._taken = 0
        self._watched = False
        self._shown_at = 0.0
        self._seen: Seen | None = None
        self._inbox: queue.SimpleQueue[Command | Read | Ready | None] = queue.SimpleQueue()
        self._grammars = GrammarDesk(engine.stacks, self._inbox.put)
        self._desk = None if adapters is None else _desk(adapters, adapter_root, self._inbox.put)
        self._sink: Callable[[EngineFrame], None] | None = None
        self._stats = engine.stats
        self._error: str | None = None
        self._busy_since: float | None = None
        self._last_step = time.monotonic()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="weft-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ the port

    @property
    def info(self) -> Any:
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    def send(self, command: Command) -> None:
        self._inbox.put(command)

    def subscribe(self, sink: Callable[[EngineFrame], None]) -> None:
        self._sink = sink

    def stalled_s(self) -> float:
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - max(since, self._last_step)

    def error(self) -> str | None:
        return self._error

    @property
    def backlog(self) -> int:
        """Commands that the engine has not taken in yet."""
        return self._inbox.qsize()

    def close(self) -> None:
        """End the thread after the step in hand; what is live is dropped."""
        self._closing = True
        if self._desk is not None:
            self._desk.close()
        self._grammars.close()
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=60)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            try:
                self._loop()
            finally:
                self.executor.close()
        except BaseException as error:  # whatever it is, the front must hear of it
            self._error = f"{type(error).__name__}: {error}" if not isinstance(error, EngineError) else str(error)
            told = (*self.engine.told(), *self._grammars.told())
            events: list[Event] = [Finished(id, at, "error", error=self._error) for id, at in told]
            self._emit(events, 0.0)
            self._refuse(self._error)
            if not isinstance(error, Exception):
                raise

    def _refuse(self, reason: str) -> None:
        """Answer what is sent to an engine that has stopped, also what was sent before its sender could know, until `close`."""
        while not self._closing and (command := self._inbox.get()) is not None:
            self._taken += isinstance(command, Command)
            events: list[Event] = []
            if isinstance(command, Add):
                events = [Finished(command.spec.id, i, "error", error=reason) for i in range(command.spec.n)]
            elif isinstance(command, (Load, Drop)):
                events = [Adapted(command.id, command.name, error=reason)]
            if events:
                self._emit(events, 0.0)

    def _loop(self) -> None:
        empty = 0
        held: list[Event] = []
        while not self._closing:
            idle = not self.engine.has_work
            if idle and held:
                self._emit(held, 0.0)
                held = []
            if self.shadow is not None and self.shadow.turn(idle):
                self._stats = self.shadow.told(self._stats)
                if self.foretell:
                    self._emit([], self._host_s, self._planned or ())
            if idle and self._busy_since is not None:
                self._busy_since = None
                if self._watched:
                    self._seen = self._at_rest()
                    self._emit([], 0.0)
                if self.idle_check:
                    self.engine.check()
            checking = self.shadow is not None and self.shadow.busy
            events = [*held, *self._drain(wait=idle and not checking)]
            held = []
            if not self.engine.has_work:
                self._seen = self._at_rest() if self._watched else None
                if events or not checking:
                    self._emit(events, 0.0)
                continue
            if self._busy_since is None:
                self._busy_since = time.monotonic()
            if self.foretell:
                held, times = step(self.engine, self.executor, planned=self._foretold(events))
                more = held
            else:
                more, times = step(self.engine, self.executor)
            self._last_step, self._host_s = time.monotonic(), times.host_s
            if self.shadow is not None:
                self.shadow.see(more)
            if not self.foretell:
                self._emit([*events, *more], times.host_s)
            empty = 0 if self._stats.rows or not self._stats.running else empty + 1
            if empty > EMPTY_STEPS:
                raise EngineError("the scheduler makes no progress although requests are running; please report this")

    def _drain(self, wait: bool) -> list[Event]:
        """Take in every command that has come; block for the first one when there is nothing to do."""
        events: list[Event] = []
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return events
            wait = False
            if command is None:
                return events
            self._taken += isinstance(command, Command)
            if isinstance(command, Watch):
                self._watched = command.on
            elif isinstance(command, Add) and command.spec.grammar is not None:
                events.extend(self._grammars.take(command.spec))
            elif isinstance(command, Add):
                events.extend(self._add(command.spec))
            elif isinstance(command, Ready):
                refused = self._grammars.entered(command)
                if refused is not None:
                    events.extend(refused or self._add(command.spec))
            elif isinstance(command, Cancel):
                self._grammars.cancel(command.id, command.index)
                self.engine.cancel(command.id, command.index)
                if self.shadow is not None:
                    self.shadow.cancelled(command.id)
            elif self._desk is not None:
                events.extend(self._desk.take(command))
            elif isinstance(command, (Load, Drop)):
                events.append(
                    Adapted(command.id, command.name, error="this engine holds no adapters", code="forbidden")
                )

    def _add(self, spec: RequestSpec) -> list[Event]:
        refused = self.engine.add(spec, time.monotonic())
        if self.shadow is not None and not refused:
            self.shadow.admit(spec)
        return refused

    def _foretold(self, events: list[Event]) -> Callable[[Plan, list[Event]], None]:
        """What tells of a plan before it is carried out, and with it of `events`."""

        def planned(plan: Plan, more: list[Event]) -> None:
            self._seen = self._look(plan) if self._watched else None
            if self.shadow is not None:
                self.shadow.see(more)
            self._emit([*events, *more], self._host_s, self.engine.members(plan), self.engine.behind(plan))

        return planned

    def _emit(
        self, events: list[Event], host_s: float, members: tuple[int, ...] = (),
        behind: tuple[tuple[int, int, int], ...] = (),
    ) -> None:  # fmt: skip
        """Make a snapshot of the figures, and a frame where there is news, or every step gives one.  members, behind: of it."""
        stats = msgspec.structs.replace(self.engine.stats, last_step_s=self._last_step, host_s=host_s)
        stats = self._grammars.counted(stats)
        if self.shadow is not None:
            stats = self.shadow.told(stats)
        self._stats = stats
        if self._sink is None or not (events or self.foretell):
            return
        seen, self._seen = self._seen, None
        plan = members if members != self._planned and self.foretell else None
        self._planned = members
        making = self._grammars.news()
        self._sink(
            EngineFrame(
                events=tuple(events), stats=stats, plan=plan, behind=behind, making=making, taken=self._taken, seen=seen
            )
        )

    def _at_rest(self) -> Seen:
        """What there is to see while nothing is computed: the blocks."""
        return self.engine.seen(Plan(step=self.engine.stats.steps))

    def _look(self, plan: Plan) -> Seen:
        """What a plan is made of; the blocks of the pool are looked at four times a second at most."""
        now = time.monotonic()
        shown = now - self._shown_at >= SHOWN_S
        self._shown_at = now if shown else self._shown_at
        return self.engine.seen(plan, blocks=shown)
