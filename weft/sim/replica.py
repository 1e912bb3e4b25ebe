"""One engine under a virtual clock: commands wait for the step in hand, as they do in a server.

advance(until)   everything that has happened by then: steps that ended are committed, one may be in flight
deliver(...)     a request that comes at that moment
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from weft.config import Limits, Stack
from weft.core.engine import Engine
from weft.sim.coast import Coast
from weft.sim.executor import facts
from weft.sim.load import load_of
from weft.sim.machines import Model
from weft.sim.metrics import Meter
from weft.sim.workload import Arrival
from weft.slots.cost import Parts, Price
from weft.types import Event, Finished, Plan, Preempted, Rejected, Tokens

LogEntry = tuple[object, ...]
FOREVER = float("inf")


class Replica:
    """name: for the report.  stack: its own, not shared with others.  blocks: of the KV pool.

    coasting: whether runs of decode steps are taken without planning each.  ended: told of answers that end, instead of the
    meter; refused: of requests that are, beside it.  image_s: a tile of an image is encoded so long, before the step after the
    request has come.
    """

    def __init__(
        self, name: str, model: Model, price: Price, stack: Stack, limits: Limits, blocks: int, meter: Meter, *,
        share: bool = True, coasting: bool = True, log: list[LogEntry] | None = None,
        ended: Callable[[Finished, float], None] | None = None, refused: Callable[[int], None] | None = None,
        image_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.name, self.model, self.price, self.meter, self.log = name, model, price, meter, log
        layers = len(model.spec.layers)
        groups = model.groups_for(bool(stack["schedule"].layered))
        self.engine = Engine(
            groups, blocks, limits, stack, layers=layers, share=share, block_bytes=model.block_bytes,
        )  # fmt: skip
        self.layers = layers
        self.aside = bool(getattr(stack.get("kv.offload"), "threads", 0))
        self._told = ended or (lambda e, now: meter.finished(e.id, now, e.cached_tokens))
        self._tells_refused = refused
        self.coasting = coasting
        self.image_s, self._owed_s = image_s, 0.0
        self._rested = False
        self.now = 0.0
        """When the last committed step ended."""
        self.ends = FOREVER
        self.quiet = 0.0
        """Nothing happens before that moment, unless a request is delivered: `advance` to an earlier one does nothing."""
        self.changes = 0
        """Moments at which something happened."""
        self._flight: tuple[Plan, Parts, float] | None = None
        self._inbox: deque[tuple[int, Arrival]] = deque()
        self._inbox_rows = 0
        self._coast = Coast(self.engine, price, len(model.figures.kinds), self._stepped, self._ended, meter.gaps, log)
        self.steps = 0

    # ------------------------------------------------------------------ what routers read

    @property
    def running(self) -> int:
        return len(self.engine.scheduler.running)

    @property
    def waiting(self) -> int:
        return len(self.engine.scheduler.waiting) + len(self._inbox)

    @property
    def unfinished(self) -> int:
        return self.running + self.waiting

    @property
    def pending(self) -> int:
        """Rows of prompts that are not computed, the inbox's included."""
        s = self.engine.scheduler
        rows = s.queued_rows + self._inbox_rows
        if self._coast.active:
            return rows  # whoever runs decodes
        return rows + sum(max(0, r.prompt - r.planned[0]) for r in s.running.values())

    @property
    def used(self) -> float:
        """Share of the KV blocks that contexts fill, those of the step in hand left out."""
        size = self.engine.kv.groups[0].block_tokens
        held = sum(-(-(r.computed[0]) // size) for r in self.engine.scheduler.running.values())
        return min(1.0, (held + self._coast.further(size)) / self.engine.pool.total)

    # ------------------------------------------------------------------ time

    @property
    def due(self) -> float:
        """When the step in hand ends, or the next one begins; FOREVER where there is nothing to do."""
        if self._flight is not None:
            return self.ends
        if self.engine.has_work:
            return self.now
        return max(self.now, self._inbox[0][1].time_s) if self._inbox else FOREVER

    @property
    def stepping(self) -> bool:
        return self._flight is not None

    def deliver(self, id: int, arrival: Arrival) -> None:
        """Put a request into the inbox; `advance` has been called up to its time."""
        self._inbox.append((id, arrival))
        self._inbox_rows += arrival.prompt
        self.quiet = 0.0

    def advance(self, until: float, *, ahead: bool = False) -> None:
        """Take every step that begins before `until`.

        ahead: those that end later may be committed already, where nobody looks at this replica before they end.
        """
        if until >= self.quiet:
            self.changes += 1
            self.quiet = self._advance(until, ahead)

    def _advance(self, until: float, ahead: bool) -> float:
        """As `advance`; returns when something happens next."""
        while True:
            if self._flight is not None:
                if self.ends > until and not ahead:
                    return self.ends
                self._land()
            coast = self._coast
            before = min(until, self._inbox[0][1].time_s) if self._inbox else until
            if coast.active:
                self.now = coast.run(self.now, before, FOREVER if ahead else until)
                if coast.due is not None and self.now < before:
                    return coast.due[1]
            if self._inbox and self._inbox[0][1].time_s <= self.now:
                coast.stop()
                self._take_in()
            if not self.engine.has_work:
                if not self._inbox:
                    return FOREVER
                if self._inbox[0][1].time_s > self.now:
                    self.now, self._rested = self._inbox[0][1].time_s, True
                if self.now > until:
                    return self.now
                continue
            if self.now >= until:
                return self.now
            if self.coasting and not coast.active and coast.begin(self.now):
                continue
            if not coast.active:
                self._launch()

    def _take_in(self) -> None:
        while self._inbox and self._inbox[0][1].time_s <= self.now:
            id, arrival = self._inbox.popleft()
            self._inbox_rows -= arrival.prompt
            self.take_in(id, arrival)

    def take_in(self, id: int, arrival: Arrival) -> None:
        """Hand a request to the engine."""
        self._owed_s += arrival.images * self.image_s
        for event in self.engine.add(arrival.spec(id), arrival.time_s):
            if isinstance(event, Rejected):
                self._refused(id)

    def _refused(self, id: int) -> None:
        self.meter.refused(id)
        if self._tells_refused is not None:
            self._tells_refused(id)

    def _launch(self) -> None:
        """Plan a step; it ends when its parts have passed."""
        plan, events = self.engine.schedule(self.now)
        load = load_of(plan, self.model.figures, self.layers, aside=self.aside)
        load.idle, self._rested = int(self._rested), False
        parts = self.price(load)
        if self._owed_s:
            parts, self._owed_s = parts._replace(weights=parts.weights + self._owed_s), 0.0
        if self.log is not None:
            self.log.append(entry(self.now, plan, events))
        for event in events:
            if isinstance(event, Preempted):
                self.meter.preempted(event.id)
            elif isinstance(event, Rejected):
                self._refused(event.id)
        self._flight, self.ends = (plan, parts, load.whole_rows), self.now + sum(parts)

    def _land(self) -> None:
        assert self._flight is not None
        plan, parts, rows = self._flight
        self._flight = None
        running = len(self.engine.scheduler.running)
        events = self.engine.commit(self.ends, plan, facts(plan))
        self._stepped(self.now, self.ends, parts, rows, running)
        self.now, self.ends = self.ends, FOREVER
        for event in events:
            if isinstance(event, Tokens):
                self.meter.said(event.id, self.now, len(event.tokens))
        self._ended(events, self.now)

    def _ended(self, events: Sequence[Event], now: float) -> None:
        for event in events:
            if isinstance(event, Finished):
                self._told(event, now)

    def _stepped(self, start: float, end: float, parts: Parts, rows: float, running: int) -> None:
        self.steps += 1
        self.meter.step(start, end, parts, rows, running, self.engine.pool.referenced / self.engine.pool.total)


def entry(now: float, plan: Plan, events: Sequence[Event]) -> LogEntry:
    """A step of the decision log: what was planned, for whom, and on what."""
    works = tuple(
        (w.request, w.rows[0][0], len(w.tokens)) if w.layers is None and not w.guesses else w for w in plan.works
    )
    preempted = tuple((e.id, e.index) for e in events if isinstance(e, Preempted))
    enter = tuple((e.request, len(e.tokens), e.entries) for e in plan.enter)
    refused = tuple(e.id for e in events if isinstance(e, Rejected))
    return plan.step, now, works, enter, plan.leave, plan.grants, plan.kv, preempted, refused
