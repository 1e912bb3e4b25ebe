"""The engines of `weft serve`: how many there are, and what each may take."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.cli._flags import EngineFlags
from weft.cli._terminal import level, say
from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.cli.serve import ServerFlags
    from weft.front.remote import RemoteEngine
    from weft.front.replicas import Replicas
    from weft.front.wire import Start
    from weft.slots import Route


@contextlib.contextmanager
def engine(folder: Path, name: str, flags: EngineFlags, server: ServerFlags) -> Iterator[RemoteEngine | Replicas]:
    """Engines of the model in `folder`, each in a process of its own; the first shows its plan, and they load meanwhile."""
    from weft.cli._engine import command
    from weft.front.remote import RemoteEngine
    from weft.front.replicas import Replicas
    from weft.front.wire import Start

    start = Start(
        folder=str(Path(folder).resolve()),
        name=name,
        options={key: _plain(value) for key, value in flags.options().items()},
        shadow=server.checks,
        lora_root=None if server.lora_root is None else str(server.lora_root.resolve()),
        log_level=level(server.log_level),
        record=None if server.record is None else str(server.record.resolve()),
    )
    how, where = command()
    starts = shares(start, server.replicas)
    ports = [RemoteEngine(how, one, cwd=where, stall_s=server.stall_timeout) for one in starts]
    port = ports[0] if len(ports) == 1 else Replicas(ports, router(server.route))
    try:
        yield port
    finally:
        port.close()


def router(text: str) -> Route:
    """The technique of the slot `route` that a flag names.  Raises ConfigError."""
    from weft.registry import parse

    part = parse(f"route={text}")
    found: Route = part.build()
    return found


def shares(start: Start, replicas: int) -> list[Start]:
    """What each of several engines builds: an equal part of the memory, and where there are enough, cores of its own.

    Raises ConfigError where a GPU's memory would have to be parted unseen.
    """
    from msgspec import structs

    from weft.core.ledger import DEFAULT_SHARE
    from weft.exec.host import available_memory, format_size, parse_size

    if replicas == 1:
        return [start]
    memory, device = start.options.get("memory"), start.options.get("device", "auto")
    if memory is None and device == "cuda":
        raise ConfigError("--replicas on a GPU share its memory: say with --memory how much all of them may take")
    whole = parse_size(memory) if memory is not None else int(available_memory().bytes * DEFAULT_SHARE)
    options = {**start.options, "memory": whole // replicas}
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    alone = len(cpus) >= replicas and "threads" not in options
    say(f"{replicas} engines, each with {format_size(whole // replicas)} of memory")
    return [
        structs.replace(
            start, options=options, quiet=i > 0,
            cpus=tuple(cpus[i * len(cpus) // replicas : (i + 1) * len(cpus) // replicas]) if alone else (),
        )
        for i in range(replicas)
    ]  # fmt: skip


def _plain(value: Any) -> Any:
    """Paths as text, which is all that travels."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
