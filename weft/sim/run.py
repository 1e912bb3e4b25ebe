"""From words to a simulation: policies, traces, machines and models by name; one run, or many for a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from weft.config import Limits
from weft.errors import ConfigError
from weft.registry import Part, names, parse, parse_call
from weft.sim.cluster import MOST_BLOCKS, Setting
from weft.sim.kinds import cluster_of
from weft.sim.machines import encoder, hardware, model
from weft.sim.metrics import SLO, Meter
from weft.sim.traces import Encode, trace
from weft.sim.workload import Arrival, Pace, paced
from weft.slots import SLOTS

ORDER = ("schedule", "route", "place")
"""Slots in which a policy without one is looked for."""
MOST_RUNS = 1000
LONGEST_S = 1e8
"""Three years.  Steps take milliseconds: at times a thousand times as large they would be lost in rounding."""
MOST_DEVICES = 1 << 16
"""Of one engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A simulation as a user writes it.

    policy: NAME(args) of a schedule or a route, or SLOT=NAME(args); several with + between them.  cost: of the slot cost.
    devices: that compute one model together.  weight_bits: of a parameter, 0 for those of the model's dtype.  encoder: of images.
    """

    trace: str
    policy: str = "fcfs"
    hardware: str = "h100"
    model: str = "llama-3.1-8b"
    cost: str = "roofline"
    replicas: int = 1
    devices: int = 1
    slo: SLO = field(default_factory=SLO)
    pace: Pace = field(default_factory=Pace)
    seed: int = 0
    max_num_seqs: int = 256
    max_rows: int = 2048
    max_model_len: int | None = None
    block_tokens: int = 16
    blocks: int | None = None
    weight_bits: float = 0.0
    share: bool = True
    coasting: bool = True
    encoder: str = "internvit-6b"
    encode: Encode | None = field(default=None, compare=False)


def policies(text: str) -> tuple[list[Part], dict[str, Part]]:
    """(parts of an engine's stack, route and place) of 'fcfs', 'schedule=fcfs', or several with + between them.

    Raises ConfigError.
    """
    inside, outside = list[Part](), dict[str, Part]()
    for word in split(text, "+"):
        part = _part(word)
        if part.slot in outside:
            raise ConfigError(f"slot {part.slot} takes one technique; leave out {outside[part.slot]} or {part}")
        if part.slot in ("route", "place"):
            outside[part.slot] = part
        elif SLOTS[part.slot].inside:
            inside.append(part)
        else:
            raise ConfigError(f"{part} is no policy of an engine or a router; the cost is chosen with --cost")
        part.build()
    if len(outside) > 1:
        raise ConfigError(f"{outside['place']} decides which replica serves; leave out {outside['route']}")
    return inside, outside


def _part(word: str) -> Part:
    head = word.partition("(")[0]
    if "=" in head:
        return parse(word)
    name, arguments = parse_call(word)
    for slot in ORDER:
        if name in names(slot):
            return Part(slot, name, arguments)
    known = ", ".join(n for slot in ORDER for n in names(slot))
    raise ConfigError(f"there is no policy {name!r}; there are: {known}")


def split(text: str, at: str) -> list[str]:
    """Words with `at` between them, brackets and quotes left whole.  Raises ConfigError for an empty one."""
    words, depth, quote, start = list[str](), 0, "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == at and depth == 0:
            words.append(text[start:i])
            start = i + 1
    words = [w.strip() for w in (*words, text[start:])]
    if not all(words):
        raise ConfigError(f"{text[:100]!r}: something is missing beside a {at!r}")
    return words


def setting(wanted: Wanted) -> Setting:
    """Everything by name looked up.  Raises ConfigError."""
    shape = model(wanted.model, block_tokens=wanted.block_tokens, weight_bits=wanted.weight_bits)
    inside, outside = policies(wanted.policy)
    longest = shape.spec.max_positions if wanted.max_model_len is None else wanted.max_model_len
    if longest > shape.spec.max_positions:
        raise ConfigError(f"--max-model-len {longest} exceeds the {shape.spec.max_positions} of {shape.name}")
    limits = Limits(
        max_model_len=longest, max_num_seqs=wanted.max_num_seqs, max_rows=wanted.max_rows, max_samples=wanted.max_num_seqs,
        max_waiting=10_000_000,
    )  # fmt: skip
    if wanted.devices > MOST_DEVICES:
        raise ConfigError(f"one model is computed by {MOST_DEVICES} devices at most, got {wanted.devices}")
    device = hardware(wanted.hardware, wanted.devices)
    price = _part("cost=" + wanted.cost if "=" not in wanted.cost.partition("(")[0] else wanted.cost)
    if price.slot != "cost":
        raise ConfigError(
            f"--cost takes a technique of the slot cost, got {price}; there are: {', '.join(names('cost'))}"
        )
    if wanted.blocks is not None and not 1 <= wanted.blocks <= MOST_BLOCKS:
        raise ConfigError(f"--kv-blocks is from 1 to {MOST_BLOCKS}, got {wanted.blocks}")
    tiles = encoder(wanted.encoder)
    return Setting(
        image_s=tiles.tile_s(device), image_bytes=tiles.tokens * shape.spec.width * shape.figures.value_bytes,
        model=shape, hardware=device, cost=price.build(), parts=inside, route=outside.get("route"), place=outside.get("place"),
        replicas=wanted.replicas, limits=limits,
        blocks=wanted.blocks, share=wanted.share, coasting=wanted.coasting, wanted=wanted.slo, seed=wanted.seed,
    )  # fmt: skip


def load(wanted: Wanted) -> Iterator[Arrival]:
    """The arrivals.  Raises ConfigError, while they are read, where a trace is wrong or lasts longer than a clock can tell."""
    for a in paced(trace(wanted.trace, seed=wanted.seed, encode=wanted.encode), wanted.pace, wanted.seed):
        if not a.time_s <= LONGEST_S:
            raise ConfigError(
                f"{wanted.trace}: a request comes {a.time_s:.3g} s after the first, and a load lasts {LONGEST_S:.0e} s at most; "
                "look for a wrong time, or make it go faster with --time-scale"
            )
        yield a


Tell = Callable[[str, Meter], None]
"""Told what is simulated now, and where it is noted how far that has come."""


def run(wanted: Wanted, tell: Tell | None = None, title: str = "") -> tuple[dict[str, Any], Meter]:
    """One simulation: its result, and all that was noted.  Raises ConfigError."""
    cluster = cluster_of(setting(wanted))
    if tell is not None:
        tell(title or wanted.policy, cluster.meter)
    meter = cluster.run(load(wanted))
    if not meter.arrived:
        raise ConfigError(f"the trace {wanted.trace} has no requests within what was asked for")
    return cluster.result(), meter


def priced(wanted: Wanted, policy: str) -> Wanted:
    """With this policy, and with the cost that stands among its words, if one does.  Raises ConfigError."""
    words = split(policy, "+")
    costs = [word for word in words if word.startswith("cost=")]
    if len(costs) > 1:
        raise ConfigError(f"{policy[:100]!r}: a run has one cost; leave one out")
    rest = "+".join(word for word in words if word not in costs) or wanted.policy
    policies(rest)
    return replace(wanted, policy=rest, cost=costs[0].removeprefix("cost=") if costs else wanted.cost)


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a comparison.  rate: how many times the trace's own pace.  offered: requests a second."""

    policy: str
    rate: float
    offered: float
    result: dict[str, Any]
    curves: dict[str, list[tuple[float, float]]]


def compare(wanted: Wanted, chosen: Sequence[str], rates: Sequence[float], tell: Tell | None = None) -> list[Point]:
    """Every policy at every rate (times the trace's own pace).  One may bring its cost, as in fcfs+cost=nanoflow.

    Raises ConfigError.
    """
    if not 1 <= len(chosen) * len(rates) <= MOST_RUNS:
        raise ConfigError(
            f"{len(chosen)} policies at {len(rates)} rates: from 1 to {MOST_RUNS} runs are made at a time"
        )
    each = {policy: priced(wanted, policy) for policy in chosen}
    points = list[Point]()
    for rate in rates:
        pace = replace(wanted.pace, time=wanted.pace.time * rate)
        for policy, own in each.items():
            title = f"{policy} at {rate:g} ({len(points) + 1} of {len(each) * len(rates)})"
            result, meter = run(replace(own, pace=pace), tell, title)
            offered = len(meter.arrived) / meter.arrived[-1] if meter.arrived[-1] else 0.0
            points.append(Point(policy, rate, offered, result, dict(meter.curves(wanted.replicas))))
    return points
