"""What a simulated load came to: latencies, goodput, what bounded the steps, fairness, and how it went over time."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.errors import ConfigError
from weft.sim.gaps import Gaps
from weft.sim.workload import Arrival
from weft.slots.cost import PARTS, Parts

BINS = 240
"""Points of a curve over time; a bin doubles when they don't suffice."""
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class SLO:
    """Seconds to the first token, between tokens on average, and between any two of them; None asks nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    gap_s: float | None = None

    def met(self, ttft_s: float, tpot_s: float, gap_s: float) -> bool:
        return (
            (self.ttft_s is None or ttft_s <= self.ttft_s)
            and (self.tpot_s is None or tpot_s <= self.tpot_s)
            and (self.gap_s is None or gap_s <= self.gap_s)
        )


def slo(text: str | None) -> SLO:
    """'ttft=1s,tpot=50ms,gap=200ms', or some of it, as an SLO.  Raises ConfigError."""
    given: dict[str, float] = {}
    for part in (text or "").split(",") if text else ():
        name, _, value = (x.strip() for x in part.partition("="))
        if name not in ("ttft", "tpot", "gap") or name in given:
            raise ConfigError(f"an SLO is written ttft=1s,tpot=50ms,gap=200ms, each once at most; got {part[:60]!r}")
        given[name] = seconds(value)
    return SLO(ttft_s=given.get("ttft"), tpot_s=given.get("tpot"), gap_s=given.get("gap"))


def seconds(text: str) -> float:
    """'50ms', '1s', '2m' or '0.5' as seconds.  Raises ConfigError."""
    for unit, scale in (("ms", 1e-3), ("us", 1e-6), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("", 1.0)):
        if text.endswith(unit):
            try:
                value = float(text.removesuffix(unit)) * scale
            except ValueError:
                break
            if 0 < value < math.inf:
                return value
            break
    raise ConfigError(f"{text[:60]!r} is no time above 0; write 50ms, 1s or 2m")


class Curve:
    """A quantity over time, as its mean in each bin: `add(start, end, value)` for as long as it had that value."""

    def __init__(self) -> None:
        self.width_s = 0.25
        self.sums = array("d", bytes(8 * BINS))

    def add(self, start: float, end: float, value: float) -> None:
        while end >= self.width_s * BINS:
            for i in range(BINS // 2):
                self.sums[i] = self.sums[2 * i] + self.sums[2 * i + 1]
            self.sums[BINS // 2 :] = array("d", bytes(8 * (BINS - BINS // 2)))
            self.width_s *= 2
        width = self.width_s
        i = int(start / width)
        if end <= (i + 1) * width:
            self.sums[i] += (end - start) * value
            return
        while start < end:
            stop = min(end, (i + 1) * width)
            self.sums[i] += (stop - start) * value
            start, i = stop, i + 1

    def points(self, until: float) -> list[tuple[float, float]]:
        """(middle of the bin, mean) up to `until`."""
        found, width = [], self.width_s
        for i in range(min(BINS, math.ceil(until / width))):
            covered = min(width, until - i * width)
            if covered > 0:
                found.append((i * width + covered / 2, self.sums[i] / covered))
        return found


class Meter:
    """Notes of one simulation.  By request, in arrays of 8 bytes; curves over time in bins; nothing else is kept."""

    def __init__(self) -> None:
        self.arrived, self.first, self.ended = array("d"), array("d"), array("d")
        self.outputs, self.prompts, self.tenant = array("q"), array("q"), array("q")
        self.tenants: dict[str, int] = {}
        self.gaps = Gaps()
        self.done = self.refusals = self.preemptions = self.cached = 0
        self.parts = [0.0] * len(PARTS)
        self.busy_s = self.rows = self.steps = self.trained = 0.0
        self.busy, self.running, self.memory, self.tokens = Curve(), Curve(), Curve(), Curve()
        self.last_s = 0.0

    # ------------------------------------------------------------------ while it runs

    def arrives(self, a: Arrival) -> int:
        """A new request; its id."""
        self.arrived.append(a.time_s)
        self.first.append(math.nan)
        self.ended.append(math.nan)
        self.outputs.append(a.output)
        self.prompts.append(a.prompt)
        self.tenant.append(self.tenants.setdefault(a.tenant, len(self.tenants)))
        self.gaps.arrives()
        return len(self.arrived) - 1

    def said(self, id: int, now: float, tokens: int = 1) -> None:
        if self.first[id] != self.first[id]:
            self.first[id] = now
        self.gaps.said(id, now, tokens)

    def finished(self, id: int, now: float, cached: int) -> None:
        self.ended[id] = now
        self.done += 1
        self.cached += cached

    def refused(self, id: int) -> None:
        self.refusals += 1

    def preempted(self, id: int) -> None:
        self.preemptions += 1

    def step(self, start: float, end: float, parts: Parts, rows: float, running: int, memory: float) -> None:
        for i, part in enumerate(parts):
            self.parts[i] += part
        self.rows += rows
        self.steps += 1
        self.trained += parts.trained
        self.busy_s += end - start
        if end > self.last_s:
            self.last_s = end
        self.busy.add(start, end, 1.0)
        self.running.add(start, end, running)
        self.memory.add(start, end, memory)
        self.tokens.add(start, end, rows / (end - start) if end > start else 0.0)

    # ------------------------------------------------------------------ what it came to

    def latencies(self) -> tuple[list[float], list[float], list[float], list[int]]:
        """(TTFT, TPOT, end to end, request) of those that finished; of an answer of one token TPOT is 0."""
        ttft, tpot, whole, who = [], [], [], []
        for i, end in enumerate(self.ended):
            if end == end:
                ttft.append(self.first[i] - self.arrived[i])
                tpot.append((end - self.first[i]) / (self.outputs[i] - 1) if self.outputs[i] > 1 else 0.0)
                whole.append(end - self.arrived[i])
                who.append(i)
        return ttft, tpot, whole, who

    def result(self, wanted: SLO, replicas: int) -> dict[str, Any]:
        """The keys of `weft sim --json`."""
        ttft, tpot, whole, who = self.latencies()
        duration = max(self.last_s, self.arrived[-1] if self.arrived else 0.0)
        good = sum(wanted.met(a, b, self.gaps.longest[i]) for a, b, i in zip(ttft, tpot, who, strict=True))
        spoken = sum(self.outputs[i] for i in who)
        total = sum(self.parts)
        served, prompts = self._service(who)
        return {
            "requests": len(self.arrived),
            "finished": len(who),
            "refused": self.refusals,
            "duration_s": duration,
            "goodput": _share(good, duration),
            "slo_met": _share(good, len(self.arrived)),
            "ttft_s": summary(ttft),
            "tpot_s": summary([t for t, i in zip(tpot, who, strict=True) if self.outputs[i] > 1]),
            "gap_s": self.gaps.summary(self.first, QUANTILES),
            "e2e_s": summary(whole),
            "output_tok_s": _share(spoken, duration),
            "prompt_tok_s": _share(prompts, duration),
            "bound_by": {name: _share(part, total) for name, part in zip(PARTS, self.parts, strict=True)},
            "utilization": _share(self.busy_s, duration * replicas),
            "rows_per_step": _share(self.rows, self.steps),
            "steps": int(self.steps),
            "preemptions": self.preemptions,
            "cached_tokens": self.cached,
            "fairness": jain(
                served if len(self.tenants) > 1 else [self.outputs[i] / w for i, w in zip(who, whole, strict=True)]
            ),
        }

    def _service(self, who: Sequence[int]) -> tuple[list[float], int]:
        """(service of each tenant, prompt tokens of those that finished).

        A tenant's service is what its requests got of the time that they took: tokens for each second of theirs.
        """
        tokens, spent = [0.0] * len(self.tenants), [0.0] * len(self.tenants)
        prompts = 0
        for i in who:
            prompts += self.prompts[i]
            tokens[self.tenant[i]] += self.outputs[i]
            spent[self.tenant[i]] += self.ended[i] - self.arrived[i]
        return [t / s for t, s in zip(tokens, spent, strict=True) if s > 0], prompts

    def curves(self, replicas: int) -> Mapping[str, list[tuple[float, float]]]:
        """By name, points over time: shares of devices busy and of KV blocks held, sequences that run, rows a second."""
        names = {"busy": self.busy, "running": self.running, "memory": self.memory, "tokens": self.tokens}
        scale = {"busy": 1.0 / replicas, "memory": 1.0 / replicas}
        return {
            name: [(t, v * scale.get(name, 1.0)) for t, v in curve.points(self.last_s)] for name, curve in names.items()
        }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def quantile(ordered: Sequence[float], q: float) -> float:
    """By straight lines between ranks, as numpy's default."""
    if not ordered:
        return 0.0
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    mean = math.fsum(ordered) / len(ordered) if ordered else 0.0
    return {"mean": mean, **{f"p{round(100 * q)}": quantile(ordered, q) for q in QUANTILES}}


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness: 1 where all are equal, 1/n where one has everything."""
    squares = math.fsum(v * v for v in values)
    return math.fsum(values) ** 2 / (len(values) * squares) if squares else 1.0
