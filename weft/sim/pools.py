"""Replicas with roles: prompts are computed on some, answers on others, and KV goes over the link between them.

Where a request's KV has come, its blocks lie below the decode replica's pool (`core.tiers`), from which its plan loads them when
it has room: what is handed over waits outside the pool and is never computed again, but for the rows of the last block that
is not full.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import replace

import msgspec

from weft.core.tiers import record_bytes
from weft.errors import ConfigError, InvariantError
from weft.registry import Part
from weft.sim.cluster import Cluster, Look, Setting
from weft.sim.metrics import Meter
from weft.sim.replica import FOREVER, Replica
from weft.sim.workload import Arrival
from weft.slots.cost import Link, Price
from weft.slots.place import Place, Role
from weft.types import Finished, GroupKind, Rejected

KEPT = 1 << 40
"""Hits of a block that the tier takes; what the pool itself gives up has fewer, and is let go."""
AT_ONCE = Link(name="paid for by the hand-over", bytes_s=math.inf, latency_s=0.0)


def cluster_of(setting: Setting, *, log: bool = False) -> Cluster:
    """A cluster, with roles where a placement gives some."""
    return Cluster(setting, log=log) if setting.place is None else Pools(setting, log=log)


class Decoder(Replica):
    """Takes in requests whose prompts were computed elsewhere."""

    def take_in(self, id: int, arrival: Arrival) -> None:
        spec = msgspec.structs.replace(arrival.spec(id), resumed=(0,))  # it has its first token
        if any(isinstance(e, Rejected) for e in self.engine.add(spec, arrival.time_s)):
            self.meter.refused(id)
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
        self.place: Place = setting.place.build()
        self.roles: list[Role] = list(self.place.roles(setting.replicas))
        self._done: list[tuple[float, int]] = []
        """(when, request) of prompts that were computed, by their replica, in no order."""
        self._asked: dict[int, Arrival] = {}
        super().__init__(setting, log=log)

    def replica(self, i: int, price: Price, blocks: int) -> Replica:
        s, role = self.setting, self.roles[i]
        log = self.logs[i] if self.logs else None
        if role != "decode":
            ended = self._computed if role == "prefill" else None
            return Replica(
                f"{role}{i}", s.model, price, s.stack(), s.limits, blocks, self.meter, coasting=s.coasting, log=log, ended=ended,
            )  # fmt: skip
        if any(p.slot == "kv.offload" for p in s.parts):
            raise ConfigError("decode replicas keep what is handed over below their pool; leave kv.offload out")
        groups = s.model.groups_for(False)
        memory = 2 * blocks * record_bytes(groups, s.model.block_bytes)
        below = Part("kv.offload", "host", (("memory", str(memory)), ("hits", KEPT)))
        stack = replace(s, parts=[*s.parts, below]).stack()
        own = s.cost.on(replace(s.hardware, host_link=AT_ONCE), s.model.figures)
        return Decoder(f"{role}{i}", s.model, own, stack, s.limits, blocks, self.meter, coasting=s.coasting, log=log)

    def _computed(self, event: Finished, now: float) -> None:
        self._done.append((now, event.id))

    # ------------------------------------------------------------------ the load

    def run(self, arrivals: Iterable[Arrival]) -> Meter:
        self.clock = [0.0]
        self.views = [Look(r, self.clock) for r in self.replicas]
        self.sent: list[tuple[float, int]] = []
        for a in arrivals:
            if a.time_s < self.clock[0] and not self.sent:
                raise ConfigError(f"the load goes back in time, to {a.time_s} s")
            self._hand_over(a.time_s)
            self.clock[0] = a.time_s
            i = self.place.enter(a.prompt, self.views, self.roles, a.time_s)
            if self.roles[i] == "decode":
                raise InvariantError(f"the placement gave a prompt to replica {i}, which computes none")
            id = self.meter.arrives(a)
            self.replicas[i].advance(a.time_s)
            if self.roles[i] == "mixed" or a.output == 1:
                self.replicas[i].deliver(id, a)
                if self.roles[i] == "prefill":
                    self._asked[id] = a
                continue
            self._asked[id] = a
            self.replicas[i].deliver(id, replace(a, output=1))
        self._hand_over(FOREVER)
        for replica in self.replicas:
            replica.advance(FOREVER)
        return self.meter

    def _hand_over(self, until: float) -> None:
        """Let the prompts that are computed by then be computed, and whatever arrives by then arrive."""
        for replica, role in zip(self.replicas, self.roles, strict=True):
            if role == "prefill":
                replica.advance(until)
        for now, id in self._done:
            a = self._asked[id]
            if a.output == 1:
                self.meter.finished(id, now, 0)
                del self._asked[id]
            else:
                heapq.heappush(self.sent, (now + self.transfer_s(a.prompt), id))
        self._done.clear()
        while self.sent and self.sent[0][0] <= until:
            at, id = heapq.heappop(self.sent)
            a = self._asked.pop(id)
            self.clock[0] = at
            i = self.place.handoff(a.prompt, self.views, self.roles, at)
            if self.roles[i] == "prefill":
                raise InvariantError(f"the placement handed request {id} to replica {i}, which computes prompts only")
            self.replicas[i].advance(at)
            self.replicas[i].deliver(id, replace(a, time_s=at))

    def transfer_s(self, prompt: int) -> float:
        """How long the KV of a prompt is on the way, as far as it shows."""
        link = self.setting.hardware.link
        size = sum(
            g.entry_bytes * (prompt if g.window is None else min(prompt, g.window))
            for g in self.setting.model.groups if g.kind is not GroupKind.PARKED
        )  # fmt: skip
        return link.latency_s + self.place.exposed * size / link.bytes_s
