"""`Replicas`: several engines of one model behind one port.  A technique of the slot `route` says which one serves a request.

Each engine is looked after by its own `RemoteEngine`, which starts it again and gives it what it had.  One that cannot be started
any more hands what it had to the others, so that a request is lost only with the last of them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from msgspec import structs

from weft.front.port import EngineInfo, EnginePort, EngineState, FrameSink
from weft.front.remote import RemoteEngine
from weft.slots.route import Route
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
    Rejected,
    TokenItem,
    Tokens,
    Watch,
)

LATEST = ("last_step_s", "host_s", "shadow_alarm")
"""Figures of `EngineStats` of which the largest counts; the means weigh by what was compared; the others are added up."""
MEANS = ("shadow_kl", "shadow_top1")


@dataclass(slots=True)
class Given:
    """A request that an engine has.  open: sequences that have not ended.  begun: whether it has a token."""

    replica: int
    open: int
    rows: int
    begun: bool = False


class Seen:
    """A replica as a router sees it (`slots.ReplicaView`): what was given to it and has not ended."""

    def __init__(self, port: RemoteEngine) -> None:
        self._port = port
        self.open = 0
        self.pending = 0
        """Rows of prompts of which no token has come."""

    @property
    def waiting(self) -> int:
        return min(self._port.stats.waiting, self.open)

    @property
    def running(self) -> int:
        return self.open - self.waiting

    @property
    def used(self) -> float:
        stats = self._port.stats
        return stats.kv_blocks_referenced / max(1, stats.kv_blocks_total)


class Agreement:
    """Commands about adapters that several engines get: the front hears one answer, and what one has refused none keeps."""

    def __init__(self) -> None:
        self._asked: dict[int, tuple[Load | Drop, list[Adapted]]] = {}

    def ask(self, command: Load | Drop, ports: Sequence[EnginePort]) -> None:
        self._asked[command.id] = (command, [])
        for port in ports:
            port.send(command)

    def hear(self, event: Adapted, ports: Sequence[EnginePort]) -> list[Adapted]:
        """The answer, once all of `ports` have given theirs."""
        if event.id not in self._asked:
            return []
        command, answers = self._asked[event.id]
        answers.append(event)
        if len(answers) < len(ports):
            return []
        del self._asked[event.id]
        failed = next((answer for answer in answers if answer.error is not None), None)
        if failed is not None and isinstance(command, Load) and any(answer.error is None for answer in answers):
            for port in ports:
                port.send(Drop(command.id, command.name))
        return [failed or event]

    def heard(self, events: Sequence[Event], ports: Sequence[EnginePort]) -> tuple[Event, ...]:
        """Events of one of them as the front hears them."""
        return tuple(x for e in events for x in (self.hear(e, ports) if isinstance(e, Adapted) else [e]))


class Replicas:
    """An `EnginePort` over several.  `started` is done once all are up, or with the error of the first that cannot be built."""

    def __init__(self, engines: Sequence[RemoteEngine], route: Route) -> None:
        self.engines = list(engines)
        self._route = route
        self.started: Future[EngineInfo] = Future()
        self._turn = threading.Lock()
        self._sink: FrameSink | None = None
        self._seen = [Seen(engine) for engine in self.engines]
        self._given: dict[int, Given] = {}
        self._agreement = Agreement()
        self._left: set[int] = set()
        """Engines that have ended for good, and whose requests others have."""
        for i, engine in enumerate(self.engines):
            engine.subscribe(lambda frame, i=i: self._hear(i, frame))  # type: ignore[misc]
            engine.started.add_done_callback(self._up)

    # ------------------------------------------------------------------ the port

    @property
    def info(self) -> EngineInfo:
        """Of all together; waits for them.  Raises what kept one from being built."""
        return self.started.result()

    @property
    def stats(self) -> EngineStats:
        return added([engine.stats for engine in self.engines])

    def send(self, command: Command) -> None:
        with self._turn:
            if isinstance(command, Add):
                self._add(command)
            elif isinstance(command, Cancel):
                self._cancel(command)
            elif isinstance(command, Watch):
                for engine in self._here:
                    engine.send(command)
            else:
                self._agreement.ask(command, self._here)

    def subscribe(self, sink: FrameSink) -> None:
        self._sink = sink

    @property
    def _here(self) -> list[RemoteEngine]:
        """Those that have not ended for good."""
        return [engine for i, engine in enumerate(self.engines) if i not in self._left]

    def stalled_s(self) -> float:
        return max(engine.stalled_s() for engine in self.engines)

    def error(self) -> str | None:
        """Why the last of them stopped.  What the others had is handed on here."""
        errors = [engine.error() for engine in self.engines]
        if None not in errors:
            return errors[-1]
        for i, error in enumerate(errors):
            if error is not None and i not in self._left:
                self._hand_on(i)
        return None

    def state(self, stall_s: float) -> EngineState:
        """Well while one of them is: requests go there.  reason: what is wrong with the others."""
        states = [engine.state(stall_s) for engine in self.engines]
        wrong = "; ".join(f"engine {i}: {s.reason}" for i, s in enumerate(states) if s.status != "ok") or None
        best = next((s for s in states if s.status == "ok"), states[0])
        steps = [s.last_step_s for s in states if s.last_step_s is not None]
        return replace(
            best, reason=wrong, restarts=sum(s.restarts for s in states), last_step_s=min(steps, default=None),
            engines=tuple(states),
        )  # fmt: skip

    def close(self) -> None:
        close(self.engines)

    # ------------------------------------------------------------------ commands

    def _add(self, command: Add) -> None:
        spec = command.spec
        prompt = [token for item in spec.items if isinstance(item, TokenItem) for token in item.ids]
        i = self._route.choose(prompt, spec.salt, self._seen, time.monotonic())
        if self.engines[i].away:
            here = [k for k, engine in enumerate(self.engines) if not engine.away] or [
                k for k in range(len(self.engines)) if k not in self._left
            ]
            i = min(here or [i], key=lambda k: (self._seen[k].open, k))
        self._given[spec.id] = Given(i, spec.n, len(prompt))
        self._seen[i].open += spec.n
        self._seen[i].pending += len(prompt)
        self.engines[i].send(command)

    def _cancel(self, command: Cancel) -> None:
        given = self._given.get(command.id)
        if given is None:
            return
        self.engines[given.replica].send(command)
        self._ended(command.id, given, given.open if command.index is None else 1)

    def _ended(self, id: int, given: Given, sequences: int) -> None:
        """So many sequences of a request are over."""
        seen = self._seen[given.replica]
        seen.open -= min(sequences, given.open)
        given.open -= min(sequences, given.open)
        if not given.open:
            self._begun(given)
            del self._given[id]

    def _begun(self, given: Given) -> None:
        if not given.begun:
            given.begun = True
            self._seen[given.replica].pending -= given.rows

    # ------------------------------------------------------------------ frames

    def _hear(self, i: int, frame: EngineFrame) -> None:
        """On the thread of engine `i`."""
        told = frame.events
        with self._turn:
            if any(isinstance(event, Adapted) for event in told):
                told = self._agreement.heard(told, self._here)
            for event in told:
                given = self._given.get(event.id)
                if given is None or given.replica != i:
                    continue
                if isinstance(event, Tokens):
                    self._begun(given)
                elif isinstance(event, Finished):
                    self._ended(event.id, given, 1)
                elif isinstance(event, Rejected):
                    self._ended(event.id, given, given.open)
        if (told or frame.plan or frame.seen is not None) and self._sink is not None:
            self._sink(frame if told is frame.events else structs.replace(frame, events=told))

    # ------------------------------------------------------------------ engines come and go

    def _up(self, _: Future[EngineInfo]) -> None:
        with self._turn:
            join([engine.started for engine in self.engines], self.started, together)

    def _hand_on(self, i: int) -> None:
        """Engine `i` has ended for good: others go on with what it had."""
        with self._turn:
            if i in self._left:
                return
            self._left.add(i)
            here = [k for k in range(len(self.engines)) if k not in self._left]
            for entry in self.engines[i].left_over():
                given = self._given.get(entry.spec.id)
                if given is None:
                    continue
                k = min(here, key=lambda k: (self._seen[k].open, k))
                self._seen[i].open -= given.open
                self._seen[k].open += given.open
                if not given.begun:
                    self._seen[i].pending -= given.rows
                    self._seen[k].pending += given.rows
                given.replica = k
                self.engines[k].send(entry)


def join(
    parts: Sequence[Future[EngineInfo]], whole: Future[EngineInfo], one: Callable[[list[EngineInfo]], EngineInfo]
) -> None:
    """End `whole` where it can be: with the error of a part that cannot be built, or as `one` out of all of them."""
    done = [part for part in parts if part.done()]
    failed = next((error for part in done if (error := part.exception()) is not None), None)
    if whole.done():
        return
    if failed is not None:
        whole.set_exception(failed)
    elif len(done) == len(parts):
        whole.set_result(one([part.result() for part in done]))


def close(ports: Sequence[EnginePort]) -> None:
    """All at once, as each may take a while."""
    closing = [threading.Thread(target=port.close) for port in ports]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()


def added(stats: Sequence[EngineStats]) -> EngineStats:
    """Figures of several engines as of one."""
    if len(stats) == 1:
        return stats[0]
    out: dict[str, Any] = {}
    for name in EngineStats.__struct_fields__:
        values = [getattr(one, name) for one in stats]
        if name == "acts":
            out[name] = dict(sum((Counter(one) for one in values), Counter()))
        elif name in MEANS:
            weights = [one.shadow_tokens for one in stats]
            weights = weights if any(weights) else [1] * len(stats)
            out[name] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        else:
            out[name] = max(values) if name in LATEST else sum(values)
    return EngineStats(**out)


def together(infos: Sequence[EngineInfo]) -> EngineInfo:
    """What several engines of one model offer: the context that all of them take, and the blocks and sequences of all."""
    return replace(
        infos[0],
        max_model_len=min(info.max_model_len for info in infos),
        kv_blocks=sum(info.kv_blocks for info in infos),
        max_num_seqs=sum(info.max_num_seqs for info in infos),
    )
