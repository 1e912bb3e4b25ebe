"""Engines in turns: each loads once, then they measure one load after the other, A B A B, on the same cores."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.rivals.checkpoint import drawn
from bench.rivals.plan import OWN, ROOT, SETTLE_S, Cell, Plan
from bench.rivals.process import Driver, RivalError
from bench.rivals.venvs import environment
from weft.bench.limit import read_gb_s
from weft.models import load_spec
from weft.models.spec import DecoderSpec

PREPARE_S, LOAD_S, MEASURE_S = 3600.0, 1200.0, 900.0
WARM_NEW = 8
WEFT: Mapping[str, Any] = {"module": "bench.rivals.weft_driver"}

Tick = Callable[[str], None]


@dataclass(slots=True)
class Turn:
    """One load, once, of one engine.  read_gb_s: the machine's bandwidth just before and after, the better of both."""

    prefill_s: float
    step_s: float
    first: list[int]
    read_gb_s: float = 0.0


@dataclass(slots=True)
class Contender:
    """An engine with its weights loaded.  own: its name for the format.  loaded: what it says of itself (`protocol.Loaded`)."""

    engine: str
    format: str
    own: str
    driver: Driver
    loaded: dict[str, Any]
    turns: dict[Cell, list[Turn]] = field(default_factory=dict)


@dataclass(slots=True)
class Group:
    """What was measured of one shape in one format.  missing: (engine, reason) of those that were not, or not to the end."""

    shape: str
    format: str
    spec: DecoderSpec
    contenders: list[Contender] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)


def measure(
    plan: Plan, recipes: Mapping[str, Mapping[str, Any]], tick: Tick
) -> tuple[list[Group], dict[str, str], float]:
    """Every group that the plan asks for, the rivals that could not be installed with the reasons, and the seconds that
    installing took."""
    if plan.cores:
        os.sched_setaffinity(0, plan.cores)
    pythons: dict[str, Path] = {}
    absent: dict[str, str] = {}
    began = time.monotonic()
    for name in plan.only:
        try:
            pythons[name] = environment(name, recipes[name], plan.cache, tick, plan.pip_args)
        except RivalError as error:
            absent[name] = str(error)
            tick(f"{name}: {error}")
    install_s = time.monotonic() - began
    groups = []
    for shape, config in plan.shapes:
        folder = drawn(config, plan.cache / "weights" / shape, lambda text, shape=shape: tick(f"{shape}: {text}"))  # type: ignore[misc]
        for format in plan.formats:
            group = Group(shape, format, load_spec(folder))
            engines = [("weft", own, Path(sys.executable), WEFT) for own in OWN[format]]
            for name, python in pythons.items():
                if format in recipes[name]["formats"]:
                    engines.append((name, format, python, recipes[name]))
            with ExitStack() as stack:
                for engine in engines:
                    _enter(stack, plan, group, folder, engine, tick)
                rounds(plan, group, tick)
            groups.append(group)
    return groups, absent, install_s


def _enter(
    stack: ExitStack,
    plan: Plan,
    group: Group,
    folder: Path,
    engine: tuple[str, str, Path, Mapping[str, Any]],
    tick: Tick,
) -> None:
    """Start an engine and let it load; or note why it can't."""
    name, own, python, recipe = engine
    here = f"{group.shape}, {own}: {name}"
    cache = plan.cache / name / group.shape
    cache.mkdir(parents=True, exist_ok=True)
    try:
        driver = stack.enter_context(start(plan, name, own, python, recipe, cache))
        what = {"model": str(folder), "format": own, "cache": str(cache)}
        tick(f"{here} converts the weights")
        driver.ask({"do": "prepare", **what}, PREPARE_S)
        tick(f"{here} loads")
        room = {"threads": plan.threads, "batch": plan.batch, "length": plan.length}
        loaded = driver.ask({"do": "load", **what, **room}, LOAD_S)
    except RivalError as error:
        group.missing.append((f"{name} ({own})" if name == "weft" else name, str(error)))
        tick(f"{here}: {error}")
        return
    group.contenders.append(Contender(name, group.format, own, driver, loaded))


def start(plan: Plan, name: str, own: str, python: Path, recipe: Mapping[str, Any], cache: Path) -> Driver:
    """A rival's driver, on the plan's cores and under its memory limit."""
    words = {"cores": ",".join(map(str, plan.cores)), "threads": plan.threads, "cache": cache.parent}
    env = {key: str(value).format(**words) for key, value in recipe.get("env", {}).items()}
    # Its own scripts too (compilers that an engine starts, say) are found first.
    env |= {"PYTHONPATH": str(ROOT), "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    argv = [str(python), "-m", recipe["module"], "--memory", str(plan.memory_bytes)]
    if plan.cores:
        argv += ["--cores", words["cores"]]
    return Driver(name, argv, cache / f"{own}.log", env)


def rounds(plan: Plan, group: Group, tick: Tick) -> None:
    """One pass that is not counted, then the rounds.  Whoever fails is out, and noted."""
    here = f"{group.shape}, {group.format}"
    for cell in plan.cells:
        for contender in list(group.contenders):
            tick(f"{here}: {contender.engine} ({contender.own}) warms up, batch {cell.batch}")
            _turn(group, contender, Cell(cell.batch, cell.prompt, min(cell.new, WARM_NEW)), seed=0)
    for turn in range(1, plan.rounds + 1):
        before = bandwidth(plan.threads)
        for at, cell in enumerate(plan.cells):
            # Who comes first changes from round to round.
            order = group.contenders[turn % len(group.contenders) :] if group.contenders else []
            for contender in [*order, *[c for c in group.contenders if c not in order]]:
                tick(f"{here}: round {turn} of {plan.rounds}, batch {cell.batch}, {contender.engine} ({contender.own})")
                found = _turn(group, contender, cell, seed=1000 * turn + at)
                after = bandwidth(plan.threads)  # it drifts by half within a minute
                if found is not None:
                    found.read_gb_s = max(before, after)
                    contender.turns.setdefault(cell, []).append(found)
                before = after


def bandwidth(threads: int) -> float:
    """GB/s that the machine reads now."""
    time.sleep(SETTLE_S)
    return read_gb_s(threads)


def _turn(group: Group, contender: Contender, cell: Cell, seed: int) -> Turn | None:
    load = {"batch": cell.batch, "prompt": cell.prompt, "new": cell.new, "seed": seed, "vocab": group.spec.vocab}
    try:
        found = contender.driver.ask({"do": "measure", **load}, MEASURE_S)
        return checked(found, cell)
    except RivalError as error:
        group.contenders.remove(contender)
        contender.driver.close()
        group.missing.append((f"{contender.engine} ({contender.own})", str(error)))
        return None


def checked(found: Mapping[str, Any], cell: Cell) -> Turn:
    """A driver's answer as a turn.  Raises RivalError where it has not given the tokens that were asked for."""
    counts = sorted({len(tokens) for tokens in found["tokens"]})
    if len(found["tokens"]) != cell.batch or counts != [cell.new]:
        raise RivalError(
            f"{cell.batch} sequences of {cell.new} tokens were asked for, and {len(found['tokens'])} of {counts} came"
        )
    if not found["steps_s"]:
        raise RivalError("in no step did every sequence get one token, so there is nothing to time")
    return Turn(found["prefill_s"], median(found["steps_s"]), [tokens[0] for tokens in found["tokens"]])


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Median over the rounds of how many times as fast the first is, from seconds."""
    pairs = [b / a for a, b in zip(mine, theirs, strict=False)]
    return median(pairs) if pairs else None
