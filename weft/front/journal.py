"""The journal: what every live request is and has, so that no engine's death loses, doubles or changes a token.

Pure data: commands of the front in, commands for an engine out; events of an engine in, events for the front out.  No clock,
no socket.  A request goes to the engine as it came; when an engine has died, each of its sequences goes to the next one as its
prompt and its output so far (`RequestSpec.resumed`), under its own seed: the next token's noise is what it would have been.

    journal.begin(next engine)           commands: adapters again, then requests
    journal.command(add or cancel ...)   commands for the engine that there is
    journal.take(frame)                  (events for the front, commands)
    journal.died(reason)                 events: a request that was found to kill engines fails, the others stay
    journal.overdue(now, limit)          (events, commands): requests that stand still among others are computed again

Which request kills engines.  A request that was in the last plan of an engine that died is suspected when it was so at the
death before, too, and had not advanced in between, by a token or by rows of its prompt; so is one whose grammar was being made
ready beside the steps.  Rows that an engine has computed before, as contexts are computed again after each death, speak against
nobody, unless that goes on.  Suspects run alone, one after another, each until it has advanced; one under which two more engines
die fails, and nobody else does.  Those that passed and are suspected once more run alone to their ends; where they advance from
death to death, something else kills the engines.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from msgspec import structs

from weft.core import noise
from weft.front.entry import MARK, Entry, renamed
from weft.front.still import MOST_AGAIN
from weft.types import (
    Adapted,
    Add,
    Cancel,
    Command,
    Drop,
    EngineFrame,
    Event,
    Finished,
    Load,
    Noted,
    Preempted,
    RequestSpec,
    Seen,
    Tokens,
    Watch,
)

OWN_IDS = 1 << 40
"""The engine's ids from here on are the journal's; those below are the front's."""
NEW = 1 << 62
"""A row that no context has: nothing of it was computed before."""
MOST_STRIKES = 4
"""Deaths without any advance, the last two of them alone, after which a request is given up."""
MOST_ALONE = 32
"""Deaths alone, with whatever advance, after which a request is given up: the others do not wait for it forever."""


class Journal:
    """Every request that somebody waits for.  It may be written before there is any engine."""

    def __init__(self) -> None:
        self._again = False
        self.entries: dict[int, Entry] = {}
        self._routes: dict[int, tuple[Entry, int | None]] = {}
        """By engine id: the request, and which of its sequences alone it stands for."""
        self._own = OWN_IDS
        self._plan: tuple[int, ...] = ()
        self._stops: dict[int, int] = {}
        """By engine id: up to where the last plan has rows, of those in it that are behind."""
        self._sent: deque[tuple[int, int]] = deque()
        """(number of the command, engine id) of requests that the engine has not taken in yet."""
        self._making: tuple[int, ...] = ()
        """Engine ids of requests whose grammar is made ready."""
        self._count = 0
        self._steps = 0
        self.begun: tuple[int, ...] = ()
        """Requests that had their first turn in the frame that was taken last."""
        self._here = False
        self._adapters: dict[str, Load | Drop] = {}
        """What has changed about the adapters since the first engine began, newest last."""
        self._asked: dict[int, Load | Drop] = {}
        self._fatal: Counter[int] = Counter()
        """Of those that were asked for, by id: deaths before an answer."""
        self._watched = Watch(on=False)
        self._restoring: set[int] = set()
        self._suspects: deque[Entry] = deque()
        self._alone: Entry | None = None

    # ------------------------------------------------------------------ what is known

    @property
    def busy(self) -> bool:
        """Whether the engine has something to compute."""
        return bool(self._routes)

    @property
    def trying(self) -> bool:
        """Whether a request runs alone, because it may be one that kills engines."""
        return self._alone is not None

    # ------------------------------------------------------------------ the front's commands

    def command(self, command: Command | Entry) -> list[Command]:
        """Note a command of the front, or a request that another engine had; what the engine that there is gets for it."""
        if isinstance(command, Entry):
            return self._adopt(command)
        if isinstance(command, Add):
            spec = command.spec
            entry = self.entries[spec.id] = Entry(spec)
            return self._out(self._send(entry) if self._open else [])
        if isinstance(command, Cancel):
            return self._out(self._cancel(command))
        if isinstance(command, Watch):
            self._watched = command
            return self._out([command] if self._here else [])
        self._asked[command.id] = command
        return self._out([command] if self._here else [])

    def _adopt(self, entry: Entry) -> list[Command]:
        """It goes on from what the other engine has told."""
        entry.ids, entry.strikes, entry.died_at = [], 0, entry.progress
        self.entries[entry.spec.id] = entry
        return self._out(self._send(entry) if self._open else [])

    def _cancel(self, command: Cancel) -> list[Command]:
        entry = self.entries.get(command.id)
        if entry is None:
            return []
        if command.index is None:
            gone = self._withdraw(entry)
            del self.entries[command.id]
            return [*gone, *self._next(entry)]
        told: list[Command] = []
        for id in list(entry.ids):
            index = self._routes[id][1]
            if index is None:
                told.append(Cancel(id, command.index))
            elif index == command.index:
                told.append(Cancel(id))
                self._unroute(id)
        entry.lines[command.index].done = True
        return [*told, *self._settle(entry)]

    # ------------------------------------------------------------------ an engine's life

    def begin(self, stack: Iterable[str] = ()) -> list[Command]:
        """A new engine is there: what it gets first.  stack: the server's parts, as slot=name(args)."""
        self._here = True
        self._again = any(part.startswith(MARK) for part in stack)
        self._plan, self._making, self._stops, self._count = (), (), {}, 0
        self._sent.clear()
        again = []
        for change in self._adapters.values():
            change = structs.replace(change, id=self._own_id())
            self._restoring.add(change.id)
            again.append(change)
        watched = [self._watched] if self._watched.on else []
        return self._out([*watched, *again, *self._asked.values(), *self._go_on()])

    def died(self, reason: str) -> list[Event]:
        """The engine is gone.  Events for the front: of the request that was found to kill engines, where one was."""
        events: list[Event] = [
            Noted(e.spec.id, 0, "engine_died", {"reason": reason}) for e in self.entries.values() if e.spec.timeline
        ]
        suspected = self._suspected()
        events += self._given_up(reason) if self._here else ()
        self._here = False
        self._routes.clear()
        self._restoring.clear()
        for entry in self.entries.values():
            entry.ids.clear()
            entry.still.wait()
        tried, self._alone = self._alone, None
        if tried is not None:
            if tried in suspected:
                tried.strikes = (tried.strikes if tried.died_at == tried.progress else 0) + 1
                tried.alone += 1
            tried.died_at = tried.progress
            if tried.strikes >= MOST_STRIKES or tried.alone >= MOST_ALONE:
                text = f"this request ended the engine each time that it was computed ({reason}); it is not tried again"
                events += tried.failed(text)
                del self.entries[tried.spec.id]
            else:
                self._suspects.appendleft(tried)
            return events
        for entry in self.entries.values():
            same = entry in suspected and entry.died_at == entry.progress
            entry.strikes = (entry.strikes if same else 0) + (entry in suspected)
            entry.died_at = entry.progress
        self._suspects = deque(e for e in self.entries.values() if e.strikes > 1)
        return events

    def _suspected(self) -> set[Entry]:
        """Those of the last plan, and those that were sent to the engine and not taken in yet, or whose grammar it is at."""
        stops: dict[Entry, int] = {}
        for id in (*self._plan, *self._making, *(id for _, id in self._sent)):
            if id in self._routes:
                entry = self._routes[id][0]
                stops[entry] = max(stops.get(entry, 0), self._stops.get(id, NEW))
        return {entry for entry, stop in stops.items() if entry.suspected(stop)}

    def _given_up(self, reason: str) -> Iterator[Event]:
        """Answers to what was asked about adapters, where engine after engine died before it gave one: all would."""
        self._fatal.update(self._asked.keys())
        for id in [id for id in self._asked if self._fatal[id] >= MOST_STRIKES]:
            del self._fatal[id]
            text = f"the engine ended each time that it was asked for this ({reason}); it is not asked again"
            yield Adapted(id, self._asked.pop(id).name, error=text, code="invalid_adapter")

    # ------------------------------------------------------------------ requests that stand still

    def overdue(self, now: float, limit_s: float) -> tuple[list[Event], list[Command]]:
        """Compute again what has stood still for `limit_s` seconds in an engine that steps, and give up what does so again and
        again.  Ask now and then.  What waits for its turn, or for blocks, stands in a queue and not still; of a search nothing is
        told before it is decided, so nobody can say.
        """
        turns = {self._routes[id][0] for id in self._plan if id in self._routes}
        events: list[Event] = []
        commands: list[Command] = []
        for entry in [e for e in self.entries.values() if not e.again]:
            if entry.still.overdue(entry.progress, entry.length, now, self._steps, limit_s, entry in turns):
                commands += self._withdraw(entry)
                if not entry.still.hopeless:
                    commands += self._send(entry)
                else:
                    del self.entries[entry.spec.id]
                    times = f"it was computed {MOST_AGAIN + 1} times"
                    events += entry.failed(f"this request did not advance, though {times}; the server goes on")
                    commands += self._next(entry)
        return events, self._out(commands)

    # ------------------------------------------------------------------ the engine's frames

    def take(self, frame: EngineFrame) -> tuple[list[Event], list[Command]]:
        """(events for the front, commands for the engine) of a frame."""
        self._steps += 1
        self.begun = ()
        if frame.plan is not None:
            self._plan = frame.plan
            fresh = {e for id in frame.plan if id in self._routes and not (e := self._routes[id][0]).begun}
            for entry in fresh:
                entry.begun = True
            self.begun = tuple(entry.spec.id for entry in fresh)
        self._stops = {id: stop for id, _, stop in frame.behind}
        for id, rows, _ in frame.behind:
            if id in self._routes:
                entry = self._routes[id][0]
                entry.reached = max(entry.reached, rows)
        while self._sent and self._sent[0][0] <= frame.taken:
            self._sent.popleft()
        if frame.making is not None:
            self._making = frame.making
        events: list[Event] = []
        commands: list[Command] = []
        for event in frame.events:
            if isinstance(event, Adapted):
                commands += self._adapted(event, events)
                continue
            route = self._routes.get(event.id)
            if route is not None:
                entry, index = route
                if isinstance(event, Preempted):
                    entry.still.wait()
                told = event if event.id == entry.spec.id else renamed(event, entry.spec.id, index)
                events += self._note(entry, told)
                if not isinstance(told, Tokens | Preempted | Noted):
                    commands += self._ended(entry, event, told)
        if self._alone is not None and self._cleared(self._alone):
            commands += self._next(self._alone)
        return events, self._out(commands)

    def _note(self, entry: Entry, event: Event) -> Iterator[Event]:
        """Put down what the front will have; gives what it does not have yet."""
        if isinstance(event, Tokens):
            line = entry.lines[event.index]
            if line.done:
                return
            if event.prompt_logprobs:
                held = min(entry.skip, len(event.prompt_logprobs))
                entry.skip -= held
                entry.told += len(event.prompt_logprobs) - held
                event = structs.replace(event, prompt_logprobs=event.prompt_logprobs[held:]) if held else event
            if line.skip and event.tokens:
                held = min(line.skip, len(event.tokens))
                line.skip -= held
                event = structs.replace(event, tokens=event.tokens[held:], logprobs=event.logprobs[held:])
            if event.tokens:
                line.cached = event.cached_tokens if line.cached is None else line.cached
                line.output += event.tokens
            if event.tokens or event.prompt_logprobs:
                yield event
        elif isinstance(event, Finished):
            cached = entry.lines[event.index].cached
            if not entry.lines[event.index].done:
                yield event if cached in (None, event.cached_tokens) else structs.replace(event, cached_tokens=cached)
        else:
            yield event

    def _ended(self, entry: Entry, event: Event, told: Event) -> list[Command]:
        """A sequence, or the whole request, is over.  event: as the engine said it."""
        for index, line in enumerate(entry.lines):
            line.done |= not isinstance(told, Finished) or told.index == index
        alone = self._routes[event.id][1] is not None
        if alone or (not entry.again and all(line.done for line in entry.lines)):
            self._unroute(event.id)  # the engine has done with it
        return self._settle(entry)

    def _settle(self, entry: Entry) -> list[Command]:
        """Forget a request whose sequences have all ended."""
        if not all(line.done for line in entry.lines):
            return []
        self.entries.pop(entry.spec.id, None)
        return [*self._withdraw(entry), *self._next(entry)]

    def _adapted(self, event: Adapted, events: list[Event]) -> list[Command]:
        asked = self._asked.pop(event.id, None)
        del self._fatal[event.id]
        if asked is not None:
            if event.error is None:
                self._adapters.pop(asked.name, None)
                self._adapters[asked.name] = asked
            events.append(event)
        elif event.id in self._restoring:
            self._restoring.discard(event.id)
            return self._go_on()
        return []

    def shown(self, seen: Seen) -> Seen:
        """The same, with requests by the ids under which the front knows them."""
        routes = self._routes
        blocks = None if seen.blocks is None else tuple(
            (block, refs, routes[id][0].spec.id if id in routes else 0) for block, refs, id in seen.blocks
        )  # fmt: skip
        return structs.replace(seen, blocks=blocks)

    # ------------------------------------------------------------------ sending

    @property
    def _open(self) -> bool:
        """Whether requests go straight to the engine."""
        return self._here and not self._restoring and self._alone is None

    def _go_on(self) -> list[Command]:
        """Everything that the engine does not have yet: one suspect alone while there are any, else all."""
        if self._restoring or not self._here:
            return []
        while self._suspects:
            self._alone = self._suspects.popleft()
            if self._alone.spec.id in self.entries:
                return self._send(self._alone)
        self._alone = None
        return [c for entry in list(self.entries.values()) if not entry.ids for c in self._send(entry)]

    def _cleared(self, entry: Entry) -> bool:
        """Whether a request that runs alone has shown that it kills nothing where the engines died."""
        return entry.progress > entry.died_at and not entry.passed

    def _next(self, entry: Entry) -> list[Command]:
        """If this is the request that runs alone: it has passed, or is over, and the next one, or everybody, has their turn."""
        if entry is not self._alone:
            return []
        entry.passed = True
        entry.strikes = 0
        return [*self._withdraw(entry), *self._go_on()]

    def _withdraw(self, entry: Entry) -> list[Command]:
        """Take a request from the engine; what it still says of it is dropped."""
        ids = list(entry.ids)
        for id in ids:
            self._unroute(id)
        return [Cancel(id) for id in ids]

    def _send(self, entry: Entry) -> list[Command]:
        """Everything of a request that has not ended, as it goes on from where the front has it."""
        spec, again = entry.spec, entry.sent
        if entry.given:
            # The client has something, so there is nothing left that could be late.
            spec = structs.replace(spec, ttft_s=None)
        entry.sent = True
        entry.again |= self._again
        if entry.again or not any(line.output or line.done for line in entry.lines):
            entry.skip = entry.told
            for line in entry.lines:
                line.skip = len(line.output)
            return self._add(entry, structs.replace(spec, id=self._own_id() if again else spec.id), None)
        commands: list[Command] = []
        # Where there is output, the prompt's log-probabilities have all been told.
        law = structs.replace(spec.sampling, prompt_logprobs=-1)
        for index, line in enumerate(entry.lines):
            if not line.done:
                part = structs.replace(
                    spec, id=self._own_id(), n=1, seed=noise.child_seed(spec.seed, index), sampling=law,
                    resumed=tuple(line.output),
                )  # fmt: skip
                commands += self._add(entry, part, index)
        return commands

    def _add(self, entry: Entry, spec: RequestSpec, index: int | None) -> list[Command]:
        entry.ids.append(spec.id)
        self._routes[spec.id] = (entry, index)
        return [Add(spec)]

    def _out(self, commands: list[Command]) -> list[Command]:
        """Commands as they leave for the engine, which says how many it has taken in."""
        for command in commands:
            self._count += 1
            if isinstance(command, Add):
                self._sent.append((self._count, command.spec.id))
        return commands

    def _own_id(self) -> int:
        self._own += 1
        return self._own

    def _unroute(self, id: int) -> None:
        entry, _ = self._routes.pop(id)
        entry.ids.remove(id)
