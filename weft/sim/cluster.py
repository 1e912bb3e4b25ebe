"""A cluster: replicas behind a router, and the load that runs through them in the order of time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.config import Limits, Stack, build_stack
from weft.errors import ConfigError, InvariantError
from weft.registry import Part
from weft.sim.machines import Model
from weft.sim.metrics import SLO, Meter
from weft.sim.replica import FOREVER, LogEntry, Replica
from weft.sim.workload import Arrival
from weft.slots.cost import Cost, Hardware, Price
from weft.slots.route import Route

MOST_BLOCKS = 1 << 24
"""Of one pool; what has room for more is taken to have so many, which no load fills."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is simulated.  parts: of the engines' stack (each has its own).  blocks: KV blocks of a replica, None for what fits.

    cost: the technique that prices steps.  coasting: False takes every step by itself (slower, the same).
    image_s, image_bytes: what a tile of an image takes to encode, and what its embeddings are sent as.
    """

    model: Model
    hardware: Hardware
    cost: Cost
    parts: Sequence[Part] = ()
    route: Part | None = None
    place: Part | None = None
    replicas: int = 1
    limits: Limits
    blocks: int | None = None
    share: bool = True
    coasting: bool = True
    wanted: SLO = field(default_factory=SLO)
    seed: int = 0
    image_s: float = 0.0
    image_bytes: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= 100_000:
            raise ConfigError(f"from 1 to 100000 replicas can be simulated, got {self.replicas}")

    def stack(self) -> Stack:
        return build_stack(self.parts)

    def kv_blocks(self) -> int:
        if self.blocks is not None:
            return self.blocks
        apart = getattr(self.cost, "kv_bytes", 0.0)  # of devices that have the KV pool and no weights
        fit = max(1, int(0.9 * apart // self.model.block_bytes)) if apart else self.model.blocks(self.hardware)
        return min(fit, MOST_BLOCKS)


class Look:
    """A replica as a router sees it at the moment of a request; those that it does not look at need not be brought there.

    What it sees is counted again only where something has happened since: most of many replicas are within a step.
    """

    __slots__ = ("_changes", "_clock", "_pending", "_replica", "_running", "_waiting")

    def __init__(self, replica: Replica, clock: list[float]) -> None:
        self._replica, self._clock, self._changes = replica, clock, -1
        self._running = self._waiting = self._pending = 0

    def _now(self) -> None:
        replica = self._replica
        replica.advance(self._clock[0])
        if self._changes != replica.changes:
            self._changes = replica.changes
            self._running, self._waiting, self._pending = replica.running, replica.waiting, -1

    @property
    def running(self) -> int:
        if self._clock[0] >= self._replica.quiet or self._changes != self._replica.changes:
            self._now()
        return self._running

    @property
    def waiting(self) -> int:
        if self._clock[0] >= self._replica.quiet or self._changes != self._replica.changes:
            self._now()
        return self._waiting

    @property
    def pending(self) -> int:
        if self._clock[0] >= self._replica.quiet or self._changes != self._replica.changes:
            self._now()
        if self._pending < 0:
            self._pending = self._replica.pending
        return self._pending

    @property
    def used(self) -> float:
        self._now()
        return self._replica.used


class Cluster:
    """A setting at work.  log: keeps the decisions of each replica."""

    def __init__(self, setting: Setting, *, log: bool = False) -> None:
        self.setting, self.meter = setting, Meter()
        price = setting.cost.on(setting.hardware, setting.model.figures)
        self.peak_tok_s = float(getattr(price, "peak_tok_s", 0.0))
        blocks = setting.kv_blocks()
        self.route: Route = (setting.route or Part("route", "round_robin")).build()
        self.logs: list[list[LogEntry]] = [[] for _ in range(self.engines if log else 0)]
        self.replicas = [self.replica(i, price, blocks) for i in range(self.engines)]

    @property
    def engines(self) -> int:
        return self.setting.replicas

    def replica(self, i: int, price: Price, blocks: int) -> Replica:
        """The engine number i."""
        s = self.setting
        return Replica(
            f"replica{i}", s.model, price, s.stack(), s.limits, blocks, self.meter, share=s.share, coasting=s.coasting,
            log=self.logs[i] if self.logs else None, image_s=s.image_s,
        )  # fmt: skip

    def run(self, arrivals: Iterable[Arrival]) -> Meter:
        """Let the load pass, and everybody finish."""
        replicas, meter, route = self.replicas, self.meter, self.route
        looks = route.looks and len(replicas) > 1
        clock = [0.0]
        views = [Look(r, clock) for r in replicas]
        last = 0.0
        for a in arrivals:
            if a.time_s < last:
                raise ConfigError(f"the load goes back in time, from {last} s to {a.time_s} s")
            clock[0] = last = a.time_s
            target = replicas[0]
            if len(replicas) > 1:
                i = route.choose(a.tokens(), a.tenant.encode(), views, a.time_s)
                if not 0 <= i < len(replicas):
                    raise InvariantError(f"the router chose replica {i} of {len(replicas)}")
                target = replicas[i]
            target.advance(a.time_s, ahead=not looks)
            target.deliver(meter.arrives(a), a)
        for replica in replicas:
            replica.advance(FOREVER)
        return meter

    def result(self) -> dict[str, Any]:
        found = self.meter.result(self.setting.wanted, self.engines)
        found["tok_per_usd"] = self._per_usd(found["output_tok_s"])
        return {**found, **self._trained(found["duration_s"])} if self.peak_tok_s else found

    def _per_usd(self, output_tok_s: float) -> float | None:
        """Tokens of answers for each US dollar of rent; None where what a device costs is not known."""
        s, apart = self.setting, getattr(self.setting.cost, "price_h", None)
        price_h = s.replicas * (s.hardware.price_h * s.hardware.devices + (apart or 0.0))
        known = s.hardware.price_h > 0 and apart != 0
        return 3600 * output_tok_s / price_h if known else None

    def _trained(self, duration_s: float) -> dict[str, float]:
        """What became of a fine-tuning job: beside the steps, and at full speed while there are none."""
        whole_s = duration_s * self.engines
        trained = self.meter.trained + max(0.0, whole_s - self.meter.busy_s) * self.peak_tok_s
        return {"trained_tok_s": trained / duration_s, "trained_share": trained / (whole_s * self.peak_tok_s)}
