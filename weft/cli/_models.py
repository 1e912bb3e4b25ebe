"""Several models of one server: their names, what does not go with them, and their memory, planned before any is loaded.

    python -m weft.cli._models FOLDER < models.json

says what models take.  It is a process of its own, as a GPU is asked by PyTorch, which the process that answers HTTP never loads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from weft.cli._terminal import say
from weft.errors import CapacityError, ConfigError, EngineError

if TYPE_CHECKING:
    from weft.cli._flags import EngineFlags
    from weft.cli._server import ServerFlags
    from weft.front.wire import Start

PLANNING_S = 300.0


@dataclass(frozen=True, slots=True)
class Chosen:
    """A model that is to be served.  id: what it is called by itself; names: what requests call it, at least one."""

    folder: Path
    id: str
    names: list[str]


class Figures(msgspec.Struct, tag="figures"):
    """What a model takes, in bytes.  fixed: beside its KV pool.  need: of the pool, for one sequence of `length` tokens, its
    longest.  usual: of the pool, where nobody says how much memory there is; most: what all its sequences can fill.
    checks: of shadow checks, which an engine takes beside its memory."""

    fixed: int
    need: int
    usual: int
    most: int
    length: int
    available: int
    checks: int = 0


class Refused(msgspec.Struct, tag="refused"):
    """Why there are no figures.  capacity: for want of memory."""

    message: str
    capacity: bool = False


def names_of(models: Sequence[str | None], given: Sequence[str]) -> list[list[str]]:
    """The names that requests use for each.  given: all of a single model, or one for each of several, in their order.

    Raises ConfigError.
    """
    from weft.hub import model_id

    if len(models) == 1:
        return [list(given) or [model_id(models[0])]]
    if given and len(given) != len(models):
        raise ConfigError(
            f"{len(models)} models and {len(given)} names: give --served-model-name once for each, in their order, or never"
        )
    names = list(given) or [model_id(model) for model in models]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise ConfigError(f"two of the models have the name {twice!r}; give each its own with --served-model-name")
    return [[name] for name in names]


def check(server: ServerFlags, flags: EngineFlags) -> None:
    """What does not go with several models.  Raises ConfigError."""
    if server.replicas > 1 or server.roles is not None:
        raise ConfigError("several models have an engine each; leave --replicas and --roles out")
    if server.record is not None:
        raise ConfigError("--record takes down what one engine decides; serve one model alone")
    if flags.lora or server.lora_root is not None:
        raise ConfigError("an adapter belongs to one model; leave --lora and --lora-root out, or serve its model alone")


def planned(starts: Sequence[Start], names: Sequence[str]) -> list[Start]:
    """What each engine builds, with its part of the memory and, where there are enough, cores of its own.

    Raises CapacityError where the memory does not hold the longest sequence of each, ConfigError for what none can be built of.
    """
    from msgspec import structs

    from weft.exec.host import format_size

    figures = _asked(starts, names)
    parts = divided(figures, names, starts[0].options.get("memory"))
    out: list[Start] = []
    for start, one, part, name, cpus in zip(
        starts, figures, parts, names, cores(len(starts), starts[0].options), strict=True
    ):
        where = f", on {len(cpus)} core{'' if len(cpus) == 1 else 's'}" if cpus else ""
        say(f"{name}: {format_size(part + one.checks)} of memory, sequences of {one.length:,} tokens{where}")
        options = {**start.options, "memory": part, "max_model_len": one.length}
        out.append(structs.replace(start, options=options, cpus=cpus))
    return out


def divided(figures: Sequence[Figures], names: Sequence[str], memory: str | int | None) -> list[int]:
    """Bytes for each engine: what it takes beside its pool, and of the rest a part by what its longest sequence needs.

    memory: what all of them may take; None for the usual pools, within the usual share of what is available.
    Raises CapacityError, which says how many bytes are missing.
    """
    from weft.core.ledger import DEFAULT_SHARE, parted
    from weft.exec.host import format_size, parse_size

    available = min(one.available for one in figures)
    asked = None if memory is None else parse_size(str(memory))
    budget = int(available * DEFAULT_SHARE) if asked is None else min(asked, available)
    fixed = [one.fixed + one.checks for one in figures]
    needed = sum(fixed) + sum(one.need for one in figures)
    if needed > budget:
        each = "; ".join(
            f"{name} takes {format_size(own)} and {format_size(one.need)} for a sequence of {one.length:,} tokens"
            for name, own, one in zip(names, fixed, figures, strict=True)
        )
        bound = (
            f"weft takes {format_size(budget)} of the {format_size(available)} that are available unless --memory says more"
            if asked is None
            else f"--memory allows {format_size(budget)}"
            if budget == asked
            else f"{format_size(available)} are available"
        )
        raise CapacityError(
            f"the models do not fit together: {each}; that is {format_size(needed)}, but {bound}: "
            f"{needed - budget} bytes are missing; try a smaller --max-model-len, smaller models, or more memory"
        )
    most = [one.usual if asked is None else one.most for one in figures]
    pools = parted(budget - sum(fixed), [one.need for one in figures], most)
    return [one.fixed + pool for one, pool in zip(figures, pools, strict=True)]


def cores(engines: int, options: dict[str, Any]) -> list[tuple[int, ...]]:
    """Cores for each of several engines, none where there are fewer, or where the user has said how many threads there are."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cpus) < engines or "threads" in options:
        return [()] * engines
    return [tuple(cpus[i * len(cpus) // engines : (i + 1) * len(cpus) // engines]) for i in range(engines)]


# ---------------------------------------------------------------------------------------------- the process that says


def _asked(starts: Sequence[Start], names: Sequence[str]) -> list[Figures]:
    """Raises ConfigError or CapacityError, which names the model."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "weft.cli._models", os.getcwd()],
            cwd=Path(__file__).resolve().parents[2],
            input=msgspec.json.encode([(start.folder, start.options, start.shadow is not None) for start in starts]),
            stdout=subprocess.PIPE,
            timeout=PLANNING_S,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"the models could not be looked at within {PLANNING_S:g} s; are their files there?"
        ) from None
    if done.returncode:
        raise EngineError(f"the models could not be looked at: the process for it ended with status {done.returncode}")
    told = msgspec.json.decode(done.stdout, type=list[Figures | Refused])
    for name, one in zip(names, told, strict=True):
        if isinstance(one, Refused):
            raise (CapacityError if one.capacity else ConfigError)(f"{name}: {one.message}")
    return [one for one in told if isinstance(one, Figures)]


def main(folder: str) -> None:
    """folder: what relative paths start from."""
    os.chdir(folder)
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=list[tuple[str, dict[str, Any], bool]])
    told: list[Figures | Refused] = []
    for model, options, checked in asked:
        try:
            told.append(figures_of(Path(model), options, checked=checked))
        except EngineError as error:
            told.append(Refused(str(error), isinstance(error, CapacityError)))
    sys.stdout.buffer.write(msgspec.json.encode(told))


def figures_of(folder: Path, options: dict[str, Any], *, checked: bool = False) -> Figures:
    """options: of the engine; a context that is longer than the model's own becomes that.  checked: by a shadow.

    Raises ConfigError, CapacityError.
    """
    from dataclasses import replace

    from weft.exec.build import engine_config, prepare

    wanted = options.get("max_model_len")
    given = engine_config(folder, {name: v for name, v in options.items() if name not in ("memory", "max_model_len")})
    own = prepare(given)
    if own.draft is not None:
        raise ConfigError(
            "a draft with a model of its own guesses for one model; serve that alone, or use one such as draft=ngram"
        )
    if wanted is not None and wanted < 1:
        raise ConfigError(f"--max-model-len must be at least 1, got {wanted}")
    length = min(wanted or own.spec.max_positions, own.spec.max_positions)
    config = replace(given, max_model_len=length)
    usual, smallest = prepare(config).plan, prepare(replace(config, memory_bytes=1))
    least, checks = smallest.plan, 0  # which holds one sequence
    if checked:
        from weft.exec.shadow import planned as widened

        checks = widened(smallest).plan.total_bytes - least.total_bytes
    return Figures(
        fixed=least.total_bytes - least.kv_bytes,
        need=least.kv_bytes,
        usual=max(usual.kv_bytes, least.kv_bytes),
        most=own.limits.max_num_seqs * least.kv_bytes,
        length=length,
        available=usual.available_bytes,
        checks=checks,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
