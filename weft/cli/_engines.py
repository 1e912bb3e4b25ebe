"""The engines of `weft serve`: how many there are, and what each may take."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.cli._flags import EngineFlags
from weft.cli._models import Chosen, cores, planned
from weft.cli._terminal import level, say
from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.cli._server import ServerFlags
    from weft.cli._watch import WatchFlags
    from weft.front.remote import RemoteEngine
    from weft.front.replicas import Replicas
    from weft.front.roles import Roles
    from weft.front.wire import Start
    from weft.slots import Route


@contextlib.contextmanager
def engines(
    models: Sequence[Chosen], flags: EngineFlags, server: ServerFlags, watch: WatchFlags
) -> Iterator[list[RemoteEngine | Replicas | Roles]]:
    """What computes each model, in processes of its own, which show their plans and load meanwhile."""
    from weft.cli._engine import command
    from weft.front.remote import RemoteEngine
    from weft.front.replicas import Replicas, close
    from weft.front.roles import Roles

    how, where = command()

    def made(start: Start, of: str = "") -> RemoteEngine:
        limits = {"stall_s": server.stall_timeout, "request_stall_s": server.request_stall_timeout}
        return RemoteEngine(how, start, cwd=where, of=of, **limits)

    def started(starts: list[Start]) -> RemoteEngine | Replicas:
        ports = [made(one) for one in starts]
        return ports[0] if len(ports) == 1 else Replicas(ports, router(server.route))

    starts = [_start(model, flags, server, watch) for model in models]
    with contextlib.ExitStack() as held:
        ports: list[RemoteEngine | Replicas | Roles]
        if len(starts) > 1:
            names = [model.names[0] for model in models]
            ports = [made(start, name) for name, start in zip(names, planned(starts, names), strict=True)]
        elif server.roles is None:
            ports = [started(shares(starts[0], server.replicas))]
        else:
            answering = roles(server.roles)
            first, *others = handing_over(shares(starts[0], 1 + answering), held)
            ports = [Roles(started([first]), started(others))]
        held.callback(close, ports)
        yield ports


def _start(model: Chosen, flags: EngineFlags, server: ServerFlags, watch: WatchFlags) -> Start:
    """What the engine of a model builds."""
    from weft.front.wire import Start

    return Start(
        folder=str(Path(model.folder).resolve()),
        name=model.id,
        options={key: _plain(value) for key, value in flags.options().items()},
        shadow=server.checks,
        lora_root=None if server.lora_root is None else str(server.lora_root.resolve()),
        log_level=level(server.log_level, watch.usual_level),
        log_format=watch.log_format,
        record=None if server.record is None else str(server.record.resolve()),
    )


def roles(text: str) -> int:
    """Engines that answer, of "prefill=1,decode=N".  Raises ConfigError."""
    given = dict(part.strip().partition("=")[::2] for part in text.split(","))
    counts = {role: int(count) if count.isdigit() else 0 for role, count in given.items()}
    if set(counts) != {"prefill", "decode"} or counts["prefill"] != 1 or not 1 <= counts["decode"] <= 64:
        raise ConfigError(f"--roles is prefill=1,decode=N with N from 1 to 64, got {text[:100]!r}")
    return counts["decode"]


def handing_over(starts: list[Start], held: contextlib.ExitStack) -> list[Start]:
    """The same engines with memory between them, in which the first hands prompts over: an eighth of its own, at most 1 GiB."""
    from msgspec import structs

    from weft.exec.tiers import HEAD_BYTES
    from weft.types import SharedKV

    size = min(starts[0].options["memory"] // 8, 1 << 30)
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    file = held.enter_context(tempfile.TemporaryFile(prefix="weft-handover-", dir=folder))  # noqa: SIM115
    file.truncate(HEAD_BYTES + size)
    return [
        structs.replace(
            start, shared=SharedKV(file.fileno(), size, writes=i == 0), shadow=None if i == 0 else start.shadow,
        )
        for i, start in enumerate(starts)
    ]  # fmt: skip


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
        raise ConfigError("several engines on a GPU share its memory: say with --memory how much all of them may take")
    whole = parse_size(memory) if memory is not None else int(available_memory().bytes * DEFAULT_SHARE)
    options = {**start.options, "memory": whole // replicas}
    say(f"{replicas} engines, each with {format_size(whole // replicas)} of memory")
    return [
        structs.replace(start, options=options, quiet=i > 0, cpus=cpus)
        for i, cpus in enumerate(cores(replicas, options))
    ]


def _plain(value: Any) -> Any:
    """Paths as text, which is all that travels."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
