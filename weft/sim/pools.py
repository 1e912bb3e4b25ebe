"""Replicas with roles: prompts are computed on some, answers on others, and KV goes over the link between them.

Where a request's KV has come, its blocks lie below the decode replica's pool (`core.tiers`), from which its plan loads them when
it has room: what is handed over waits outside the pool and is never computed again, but for the rows of the last block that
is not full.

Whoever has prompts in hand is taken through its steps in the order of time, so that what it hands over arrives when it would,
and a replica may have prompts and answers in hand at once while its role changes.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import msgspec

from weft.core.tiers import record_bytes
from weft.errors import ConfigError, InvariantError
from weft.registry import Part
from weft.sim.cluster import Cluster, Look, Setting
from weft.sim.metrics import Meter
from weft.sim.replica import FOREVER, Replica
from weft.sim.workload import Arrival
from weft.slots.cost import Link, Price
from weft.slots.place import Handed, Place, Role
from weft.types import Finished, GroupKind, Rejected

KEPT = 1 << 40
"""Hits of a block that the tier takes; what the pool itself gives up has fewer, and is let go."""
AT_ONCE = Link(name="paid for by the hand-over", bytes_s=math.inf, latency_s=0.0)


class Worker(Replica):
    """Takes in prompts, and requests whose prompts were computed elsewhere (`handed`).

    coded: (end, rows) of images in hand, one after the other; coded_rows: of all of these.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.handed = set[int]()
        self.coded: deque[tuple[float, float]] = deque()
        self.coded_rows = 0.0

    @property
    def pending(self) -> int:
        while self.coded and self.coded[0][0] <= self.now:
            self.coded_rows -= self.coded.popleft()[1]
        if not self.coded:
            self.coded_rows = 0.0  # whatever was lost in rounding
        return super().pending + round(self.coded_rows)

    def _advance(self, until: float, ahead: bool) -> float:
        due = super()._advance(until, ahead)
        if until == FOREVER or self.engine.has_work:
            return due
        self.now = max(self.now, until)  # an encoder's clock goes on, too
        return self.now

    def encode(self, end: float, rows: float) -> None:
        """It has a tile in hand, until then."""
        self.coded.append((end, rows))
        self.coded_rows += rows
        self.quiet = 0.0

    def take_in(self, id: int, arrival: Arrival) -> None:
        if id not in self.handed:
            super().take_in(id, arrival)
            return
        self.handed.discard(id)
        spec = msgspec.structs.replace(arrival.spec(id), resumed=(0,))  # it has its first token
        if any(isinstance(e, Rejected) for e in self.engine.add(spec, arrival.time_s)):
            self._refused(id)
            return
        request, kv = self.engine.find(id), self.engine.kv
        assert kv.tiers is not None
        for g in kv.by_model[0]:
            size = kv.groups[g].block_tokens
            kv._name(request, size, request.prompt // size * size)
            for name in request.names.get(size, ())[: request.prompt // size]:
                kv.tiers.save((g, name), KEPT)


class Pools(Cluster):
    """A cluster of which each replica has a role."""

    def __init__(self, setting: Setting, *, log: bool = False) -> None:
        assert setting.place is not None
        if not setting.share:
            raise ConfigError("KV that is handed over is found by its prefix; leave --no-prefix-cache out")
        self.setting = setting
        self.place: Place = setting.place.build()
        self._tells: Callable[[int], None] | None = getattr(self.place, "ended", None)
        self.roles: list[Role] = self.first_roles()
        self._done: list[tuple[float, int]] = []
        """(when, request) of prompts that were computed, in no order."""
        self._asked: dict[int, Arrival] = {}
        self._where: dict[int, int] = {}
        """Of a request whose prompt is being computed, its replica; and of a replica, how many there are."""
        self._prompts = Counter[int]()
        self.sent: list[tuple[float, int, bool]] = []
        """(when, request, whether its prompt is computed) of what is on its way to a replica."""
        super().__init__(setting, log=log)
        self.clock = [0.0]
        self.views = [Look(r, self.clock) for r in self.replicas]

    def first_roles(self) -> list[Role]:
        return list(self.place.roles(self.setting.replicas))

    def replica(self, i: int, price: Price, blocks: int) -> Replica:
        s, role = self.setting, self.roles[i]
        log = self.logs[i] if self.logs else None
        if role not in ("decode", "encode") and not self.place.flips:
            return Replica(
                f"{role}{i}", s.model, price, s.stack(), s.limits, blocks, self.meter, coasting=s.coasting, log=log,
                ended=self._ended, refused=self._lost, image_s=s.image_s,
            )  # fmt: skip
        return self.worker(
            f"{role}{i}", s.cost.on(replace(s.hardware, host_link=AT_ONCE), s.model.figures), blocks, log
        )

    def worker(self, name: str, price: Price, blocks: int, log: Any) -> Worker:
        """An engine to which requests can be handed, with as much room below its pool as they take."""
        s = self.setting
        if any(p.slot == "kv.offload" for p in s.parts):
            raise ConfigError("decode replicas keep what is handed over below their pool; leave kv.offload out")
        memory = 2 * blocks * record_bytes(s.model.groups_for(False), s.model.block_bytes)
        below = Part("kv.offload", "host", (("memory", str(memory)), ("hits", KEPT)))
        stack = replace(s, parts=[*s.parts, below]).stack()
        return Worker(
            name, s.model, price, stack, s.limits, blocks, self.meter, coasting=s.coasting, log=log, ended=self._ended,
            refused=self._lost, image_s=s.image_s,
        )  # fmt: skip

    def _ended(self, event: Finished, now: float) -> None:
        if event.id in self._where:
            self._done.append((now, event.id))
        else:
            self.meter.finished(event.id, now, event.cached_tokens)
            if self._tells is not None:
                self._tells(event.id)

    def _lost(self, id: int) -> None:
        """A replica has refused a request: one whose prompt it was to compute, or one that was handed to it."""
        i = self._where.pop(id, None)
        if i is not None:
            del self._asked[id]
            self._fewer(i)
        elif self._tells is not None:
            self._tells(id)

    def _fewer(self, i: int) -> None:
        """Replica i has one prompt less to compute."""
        self._prompts[i] -= 1
        if not self._prompts[i]:
            del self._prompts[i]

    # ------------------------------------------------------------------ the load

    def run(self, arrivals: Iterable[Arrival]) -> Meter:
        last = 0.0
        for a in arrivals:
            if a.time_s < last:
                raise ConfigError(f"the load goes back in time, to {a.time_s} s")
            last = a.time_s
            self._until(last)
            self.clock[0] = last
            id = self.meter.arrives(a)
            if a.images and "encode" in self.roles:
                heapq.heappush(self.sent, (self.encode(a, last), id, False))
                self._asked[id] = a
            else:
                self.enter(id, a)
        self._until(FOREVER)
        for replica in self.replicas:
            replica.advance(FOREVER)
        return self.meter

    def enter(self, id: int, a: Arrival) -> None:
        """Give a prompt to the replica that computes it."""
        self._review()
        i = self.place.enter(a.prompt, self.views, self.roles, a.time_s)
        if self.roles[i] in ("decode", "encode"):
            raise InvariantError(f"the placement gave a prompt to replica {i}, which computes none")
        self.replicas[i].advance(a.time_s)
        if self.roles[i] == "mixed":
            self.replicas[i].deliver(id, a)
        else:
            self.compute(id, a, i)

    def compute(self, id: int, a: Arrival, i: int) -> None:
        """Let replica i compute a prompt, and be told when it has."""
        self._asked[id], self._where[id] = a, i
        self._prompts[i] += 1
        self.replicas[i].deliver(id, replace(a, output=1))

    def _review(self) -> None:
        if self.place.flips:
            self.roles = list(self.place.review(self.views, self.roles, self.clock[0]))

    def encode(self, a: Arrival, now: float) -> float:
        """Give each tile to the encoder that is free first; when the last one's embeddings have come to where prompts are."""
        coders = [cast(Worker, r) for r, role in zip(self.replicas, self.roles, strict=True) if role == "encode"]
        free = [(max(now, r.coded[-1][0]) if r.coded else now, i) for i, r in enumerate(coders)]
        heapq.heapify(free)
        end = now
        for _ in range(a.images):
            start, i = heapq.heappop(free)
            end = max(end, start + self.setting.image_s)
            coders[i].encode(start + self.setting.image_s, a.prompt / a.images)
            self.meter.parts[0] += self.setting.image_s
            heapq.heappush(free, (start + self.setting.image_s, i))
        link = self.setting.hardware.link
        return end + link.latency_s + a.images * self.setting.image_bytes / link.bytes_s

    def _until(self, until: float) -> None:
        """Let all happen that does by then, in the order of time: of steps that begin then, none begins."""
        while True:
            due = [(self.replicas[i].due, i) for i in self.watched()]
            step = min(due, default=(FOREVER, -1))[0]
            sent = self.sent[0][0] if self.sent else FOREVER
            at = min(step, sent)
            if at > until or at == FOREVER:
                return
            if sent <= step:
                self._arrive()
                continue
            now = [self.replicas[i] for t, i in due if t == at]
            ending = [r for r in now if r.stepping]
            for r in ending:
                r.advance(at)
            if not ending:
                if at >= until:
                    return
                for r in now:
                    r.advance(math.nextafter(at, FOREVER))
            self._pass_on()

    def watched(self) -> Iterable[int]:
        """Replicas that have to be taken through their steps in the order of time."""
        return self._prompts

    def _pass_on(self) -> None:
        """Send off what was computed."""
        for now, id in self._done:
            a, i = self._asked[id], self._where.pop(id)
            self._fewer(i)
            self.computed(a, i, now)
            if a.output == 1:
                self.meter.finished(id, now, 0)
                del self._asked[id]
            else:
                heapq.heappush(self.sent, (now + self.transfer_s(a.prompt), id, True))
        self._done.clear()

    def computed(self, a: Arrival, i: int, now: float) -> None:
        """A prompt was computed by replica i; for who keeps count."""

    def _arrive(self) -> None:
        at, id, whole = heapq.heappop(self.sent)
        a = self._asked.pop(id)
        self.clock[0] = at
        if not whole:
            self.enter(id, replace(a, time_s=at, images=0))
            return
        i = self.answers(id, a, at)
        worker = self.replicas[i]
        worker.advance(at)
        if isinstance(worker, Worker):
            worker.handed.add(id)
        worker.deliver(id, replace(a, time_s=at, images=0))

    def answers(self, id: int, a: Arrival, at: float) -> int:
        """The replica that goes on with a request."""
        self._review()
        engine = self.replicas[0].engine
        handed = Handed(id, a.prompt, a.output, engine.pool.total * engine.kv.groups[0].block_tokens)
        i = self.place.handoff(handed, self.views, self.roles, at)
        if self.roles[i] in ("prefill", "encode"):
            raise InvariantError(f"the placement handed request {id} to replica {i}, which computes no answers")
        return i

    def transfer_s(self, prompt: int) -> float:
        """How long the KV of a prompt is on the way, as far as it shows."""
        link = self.setting.hardware.link
        size = sum(
            g.entry_bytes * (prompt if g.window is None else min(prompt, g.window))
            for g in self.setting.model.groups if g.kind is not GroupKind.PARKED
        )  # fmt: skip
        return link.latency_s + self.place.exposed * size / link.bytes_s
