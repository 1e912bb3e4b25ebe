"""Phases beside each other: a worker for prompts and one for answers on the same device, or on a pair that has all KV twice.

How two workers share a device follows from the parts of a roofline, and no constant is fitted to anybody's measurements:

arithmetic   a worker with the share c of the execution units has the share c of the peak
bandwidth    two streams share a memory max-min fairly: one has what the other leaves, and at least half.  What the other takes
             is what its step in hand moves for each second of it.  A worker with few units cannot ask for more than
             c / SATURATION: by Little's law bytes in flight are bandwidth times latency, 3.35 TB/s * 700 ns = 2.3 MB on an H100,
             18 kB of each of its 132 units, of some 32 kB that 2,048 threads with a load of 16 bytes each have under way

A step is priced when it begins, beside what the other worker does at that moment; it is not priced again when that changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

from weft.core.engine import Engine
from weft.errors import ConfigError, InvariantError
from weft.sim.cluster import Look, Setting
from weft.sim.pools import Pools
from weft.sim.replica import Replica
from weft.sim.workload import Arrival
from weft.slots import Quota, RequestView, Schedule, StepView
from weft.slots.cost import Load, Parts, Price
from weft.slots.place import Beside, Phase, Role, Twofold
from weft.slots.route import ReplicaView

SATURATION = 0.55
"""Share of the units that can ask for all of the bandwidth: 18 kB of 32 kB."""
PROMPTS = 8
"""Prompts in hand may take one of so many parts of the pool."""
STEPS = 20
"""Shares are taken in so many steps, so that prices are made once for each."""


class Pair:
    """Two workers.  prices: by (share of arithmetic, share of bandwidth).  apart: whether each has a device of its own."""

    def __init__(self, setting: Setting, apart: bool) -> None:
        self.setting, self.apart = setting, apart
        self.ttft_s = self.tpot_s = 0.0
        self.last: dict[Phase, Load] = {}
        self.draws: dict[Phase, float] = {"prefill": 0.0, "decode": 0.0}
        self.workers: dict[Phase, Replica] = {}
        self.looks: dict[Phase, Look] = {}
        self._price = lru_cache(maxsize=STEPS * STEPS)(self._priced)

    def _priced(self, compute: int, memory: int) -> Price:
        h, part = self.setting.hardware, compute / STEPS
        own = replace(
            h, flops={k: v * part for k, v in h.flops.items()}, memory_bytes_s=h.memory_bytes_s * memory / STEPS,
            host_link=replace(h.host_link, bytes_s=float("inf"), latency_s=0.0),
        )  # fmt: skip
        return self.setting.cost.on(own, self.setting.model.figures)

    def work(self, phase: Phase) -> ReplicaView:
        return self.looks[phase]

    def busy(self, phase: Phase) -> bool:
        worker = self.workers[phase]
        return worker.stepping or worker.engine.has_work or worker.waiting > 0

    def bandwidth(self, phase: Phase, compute: float, *, alone: bool) -> float:
        """The share of it that a step of this phase has."""
        if self.apart:
            return 1.0
        other: Phase = "decode" if phase == "prefill" else "prefill"
        left = 1.0 if alone or not self.workers[other].stepping else max(0.5, 1.0 - self.draws[other])
        return min(left, compute / SATURATION)

    def parts(self, phase: Phase, load: Load, compute: float, *, alone: bool = False) -> Parts:
        share = max(1, round(compute * STEPS))
        return self._price(share, max(1, round(STEPS * self.bandwidth(phase, share / STEPS, alone=alone))))(load)

    def predict(self, phase: Phase, compute: float, *, alone: bool = False) -> float:
        load = self.last.get(phase)
        return sum(self.parts(phase, load, compute, alone=alone)) if load is not None else 0.0

    def traffic_s(self, load: Load) -> float:
        """What a step moves, in seconds of the whole bandwidth."""
        model, h = self.setting.model.figures, self.setting.hardware
        read = model.read_bytes(load.rows) + (model.head_params * model.weight_bytes if load.samples else 0)
        for kind, prompt, single in zip(model.kinds, load.prompt_entries, load.decode_entries, strict=True):
            read += kind.entry_bytes * (prompt + single + load.rows)
        return read / (h.memory_bytes_s * h.devices)


class Couples(Pools):
    """Workers 2 c and 2 c + 1 are the couple c: prompts, and answers."""

    def __init__(self, setting: Setting, *, log: bool = False) -> None:
        assert setting.place is not None
        self.rule: Beside = setting.place.build()
        if setting.replicas % self.rule.couple:
            raise ConfigError(
                f"{setting.place.name} takes replicas in pairs; give an even --replicas, not {setting.replicas}"
            )
        self.pairs = [Pair(setting, self.rule.couple > 1) for _ in range(setting.replicas // self.rule.couple)]
        self.home: dict[int, int] = {}
        super().__init__(replace(setting, coasting=False), log=log)
        if self.peak_tok_s:
            raise ConfigError(
                f"{setting.place.name} has two workers beside each other, and no fine-tuning is priced there; take another --cost"
            )
        for c, pair in enumerate(self.pairs):
            pair.workers = {"prefill": self.replicas[2 * c], "decode": self.replicas[2 * c + 1]}
            pair.looks = {"prefill": self.views[2 * c], "decode": self.views[2 * c + 1]}

    @property
    def engines(self) -> int:
        return 2 * len(self.pairs)

    def first_roles(self) -> list[Role]:
        roles: list[Role] = ["prefill", "decode"]
        return roles * len(self.pairs)

    def replica(self, i: int, price: Price, blocks: int) -> Replica:
        s, pair = self.setting, self.pairs[i // 2]
        prompts = max(1, blocks // PROMPTS)
        room = max(1, blocks - prompts)
        log = self.logs[i] if self.logs else None
        if i % 2:
            worker = self.worker(f"decode{i // 2}", self.priced(i, pair, "decode"), room * self.rule.couple, log)
            if self.rule.couple > 1:
                halting = Halting(worker.engine, cast(Twofold, self.rule), pair, room)
                worker.engine.scheduler.policy = cast(Schedule, halting)
            return worker
        return Replica(
            f"prefill{i // 2}", s.model, self.priced(i, pair, "prefill"), s.stack(), s.limits, prompts, self.meter,
            coasting=False, log=log, ended=self._ended, image_s=s.image_s,
        )  # fmt: skip

    def priced(self, i: int, pair: Pair, phase: Phase) -> Price:
        """The price of a worker's next step, beside what the other one does."""
        h, entry_bytes = self.setting.hardware, sum(k.entry_bytes for k in self.setting.model.figures.kinds)

        def price(load: Load) -> Parts:
            pair.last[phase] = load
            share = self.rule.share(phase, pair, i // 2, self.replicas[i].now)
            parts = pair.parts(phase, portion(load, share.ways) if share.ways > 1 else load, share.compute)
            if pair.apart and phase == "decode":
                # Each new entry goes to the other device, too, beside the step; what takes longer than the step shows.
                sent = load.rows * entry_bytes / h.link.bytes_s + h.link.latency_s
                parts = parts._replace(communication=parts.communication + max(0.0, sent - sum(parts)))
            seconds = sum(parts)
            pair.draws[phase] = min(1.0, pair.traffic_s(load) / seconds) if seconds else 0.0
            if phase == "decode" and load.rows:
                pair.tpot_s += 0.1 * (seconds - pair.tpot_s)
            return parts

        return price

    # ------------------------------------------------------------------ the load

    def watched(self) -> Iterable[int]:
        return range(len(self.replicas))

    def enter(self, id: int, a: Arrival) -> None:
        c = self.rule.enter(a.prompt, self.pairs, a.time_s)
        if not 0 <= c < len(self.pairs):
            raise InvariantError(f"the placement chose couple {c} of {len(self.pairs)}")
        self.replicas[2 * c].advance(a.time_s)
        self.compute(id, a, 2 * c)
        self.home[id] = c

    def answers(self, id: int, a: Arrival, at: float) -> int:
        return 2 * self.home.pop(id) + 1

    def computed(self, a: Arrival, i: int, now: float) -> None:
        pair = self.pairs[i // 2]
        pair.ttft_s += 0.1 * (now - a.time_s - pair.ttft_s)

    def transfer_s(self, prompt: int) -> float:
        return super().transfer_s(prompt) if self.rule.couple > 1 else 0.0


class Halting:
    """The schedule of a pair's answers: while one device computes prompts, sequences whose KV lies there alone get no rows.

    Of those with one copy every second one lies there.
    """

    def __init__(self, engine: Engine, rule: Twofold, pair: Pair, room: int) -> None:
        self._engine, self._rule, self._pair, self._room = engine, rule, pair, room
        self._policy, self._halted = engine.scheduler.policy, frozenset[int]()
        self._seen: StepView | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def quota(self, request: RequestView, step: StepView) -> Quota:
        if step is not self._seen:
            self._seen, self._halted = step, self.halted()
        return Quota(0) if id(request) in self._halted else self._policy.quota(request, step)

    def halted(self) -> frozenset[int]:
        """Who waits in this step; never everybody, for half of those with one copy lie on the other device."""
        if not self._pair.busy("prefill"):
            return frozenset()
        there = sorted(self._engine.scheduler.running.values(), key=lambda r: r.rid)
        alone = self._rule.alone([sum(len(t.blocks) for t in r.tables) for r in there], self._room)
        return frozenset(id(there[i]) for i in alone[1::2])


def portion(load: Load, ways: int) -> Load:
    """What one of several devices computes of a step whose sequences they split."""
    return replace(
        load, rows=-(-load.rows // ways), samples=-(-load.samples // ways), works=-(-load.works // ways),
        prompt_pairs=[x / ways for x in load.prompt_pairs], prompt_entries=[x / ways for x in load.prompt_entries],
        decode_entries=[x / ways for x in load.decode_entries], decode_rows=-(-load.decode_rows // ways),
        spans=[(share, -(-rows // ways)) for share, rows in load.spans],
    )  # fmt: skip
