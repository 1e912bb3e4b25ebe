"""`weft doctor`: what this machine has, which operations weft would use on it, and why."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weft.cli._flags import Json, Model, source_of
from weft.cli._terminal import stdout

if TYPE_CHECKING:
    from weft.ops.choice import Choice

__all__ = ["doctor"]


def doctor(model: Model = None, *, json_: Json = False) -> None:
    """Say what this machine has: instructions, cores, memory, bandwidth; and which operations a model runs on, and why."""
    found = diagnosis(model)
    if json_:
        print(json.dumps(found, indent=2))
        return
    from rich.table import Table

    from weft.exec.host import format_size

    grid = Table(title="what this machine has", title_justify="left", title_style="bold", show_header=False)
    grid.add_column(no_wrap=True)
    grid.add_column()
    grid.add_row("processor", found["processor"])
    grid.add_row("cores", f"{found['cores']:g} ({found['cores_source']})")
    grid.add_row("memory free", f"{format_size(found['memory_bytes'])} ({found['memory_source']})")
    grid.add_row("reads", f"{found['read_gb_s']:.1f} GB/s with {found['read_threads']} threads")
    grid.add_row("kernels for", ", ".join(found["isas"]) or "none")
    used = f"{found['ops']}, {found['isa']}" if found["isa"] else found["ops"]
    grid.add_row("operations", f"{used}: {found['reason']}")
    for name in ("torch", "python"):
        grid.add_row(name, found[name])
    stdout().print(grid)


def diagnosis(model: str | None) -> dict[str, Any]:
    """The keys of `weft doctor --json`; ops, isa, reason: of the given model, or the bundled one.  Raises ConfigError."""
    import torch

    from weft import native
    from weft.bench.limit import READ_BYTES, read_gb_s
    from weft.exec.build import EngineConfig, prepare
    from weft.exec.host import available_memory, cpu_count, processor

    source, name = source_of(model, weights=False)
    bare = {} if not isinstance(source, dict) else {"load": "random"}
    setup = prepare(EngineConfig(model=source, **bare))  # type: ignore[arg-type]
    choice, module = setup.ops["target"], native.module()
    isas = [] if module is None else list(module.isas())
    cores, memory = cpu_count(), available_memory()
    return {
        "model": name,
        "ops": choice.ops,
        "isa": choice.isa,
        "reason": choice.reason or why(choice, isas),
        "isas": isas,
        "processor": processor(),
        "cores": cores.cores,
        "cores_source": cores.source,
        "threads": setup.threads,
        "memory_bytes": memory.bytes,
        "memory_source": memory.source,
        "read_threads": cores.threads,
        "read_gb_s": read_gb_s(cores.threads, size_bytes=min(READ_BYTES, memory.bytes // 2)),
        "device": setup.device,
        "dtype": setup.dtype,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def why(choice: Choice, isas: Sequence[str]) -> str:
    """Why a model runs on the kernels, and on which of them."""
    best = "the best" if choice.isa == isas[0] else "one"
    return f"the kernels are built and compute all of this model; {choice.isa} is {best} of what this processor has"
