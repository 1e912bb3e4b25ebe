"""`weft plan`: what a model will take, to the byte, before anything is allocated."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from weft.cli._flags import EngineFlags, Json, Model, engine_flags, source_of
from weft.cli._terminal import complain, stdout

if TYPE_CHECKING:
    from rich.table import Table

    from weft.exec.build import Setup


@engine_flags
def plan(model: Model = None, *, json_: Json = False, flags: EngineFlags) -> None:
    """Print the memory plan of a model; exit status 1 when it does not fit.

    MODEL may also be a config.json: no weights are needed for a plan.
    """
    from weft.exec.build import prepare

    flags.check()
    source, name = source_of(model, weights=False)
    setup = prepare(flags.config(source))
    if json_:
        print(json.dumps(as_json(setup, name), indent=2))
    else:
        stdout().print(table(setup, name))
    if not setup.plan.fits:
        if not json_:
            complain(setup.plan.reason)
        raise typer.Exit(1)


def as_json(setup: Setup, name: str) -> dict[str, Any]:
    """The plan's fields (bytes, tokens, blocks) and what they were computed for."""
    return {
        **setup.plan.as_dict(),
        "model": name,
        "dtype": setup.dtype,
        "device": setup.device,
        "threads": setup.threads,
        "weights": setup.weights_name,
        "activations": setup.config.activations,
        "kv": setup.kv_name,
        "ops": setup.ops["target"].ops,
        "isa": setup.ops["target"].isa,
        "max_num_seqs": setup.limits.max_num_seqs,
        "max_num_batched_tokens": setup.limits.max_rows,
        "stack": [str(part) for part in setup.stack.parts],
    }


def table(setup: Setup, name: str) -> Table:
    """The plan for people."""
    from rich.table import Table

    from weft.exec.host import format_size

    p = setup.plan
    grid = Table(title=f"memory plan of {name}", title_justify="left", title_style="bold", show_header=False)
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(style="dim")
    plural = "" if setup.threads == 1 else "s"
    threads = f", {setup.threads} thread{plural}" if setup.device == "cpu" else ""
    grid.add_row("weights", format_size(p.weights_bytes), f"{setup.weights_name} on {setup.device}{threads}")
    if p.draft_bytes:
        grid.add_row("draft model", format_size(p.draft_bytes), "its weights, workspace and laws")
    grid.add_row(
        "KV pool",
        format_size(p.kv_bytes),
        f"{p.kv_blocks:,} blocks of {p.block_tokens} tokens, {format_size(p.kv_bytes_per_token)} for each token",
    )
    if p.tiers_bytes:
        grid.add_row("below it", format_size(p.tiers_bytes), "memory for blocks that the pool gives up")
    grid.add_row(
        "workspace",
        format_size(p.workspace_bytes),
        f"{setup.limits.max_rows} rows, {setup.limits.max_samples} of logits",
    )
    if p.adapters_bytes:
        grid.add_row("adapters", format_size(p.adapters_bytes), f"at most {setup.config.max_loras} at once")
    grid.add_row("reserve", format_size(p.reserve_bytes), "interpreter, libraries, allocator slack")
    grid.add_section()
    verdict = "[green]fits[/]" if p.fits else "[bold red]does not fit[/]"
    grid.add_row("total", format_size(p.total_bytes), verdict)
    grid.add_row("available", format_size(p.available_bytes), f"by {p.available_source}" if p.available_source else "")
    grid.add_section()
    longest = f"; the model allows {p.model_max_len:,}" if p.model_max_len > p.max_model_len else ""
    grid.add_row("context", f"{p.max_model_len:,}", f"tokens{longest}; {setup.limits.max_num_seqs} sequences at once")
    grid.add_row("stack", "", " ".join(str(part) for part in setup.stack.parts))
    return grid
