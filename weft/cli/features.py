"""`weft features` and `weft compose`: what techniques there are, and which go together."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from weft.cli._flags import Json, Plugins, Recipe
from weft.cli._terminal import stdout

VERDICT = {"ok": "[green]ok[/]", "cost": "[yellow]ok, at a cost[/]", "refused": "[bold red]refused[/]"}


def features(*, plugin: Plugins = None, json_: Json = False) -> None:
    """List every technique with its slot, paper, fidelity and traits."""
    from weft.registry import load_plugin

    for path in plugin or ():
        load_plugin(path)
    from rich.table import Table

    from weft.features import features as find
    from weft.slots import SLOTS

    found = find()
    if json_:
        print(json.dumps([f.as_dict() for f in found], indent=2))
        return
    grid = Table("technique", "fidelity", "what it does", "paper", title_justify="left")
    for f in found:
        null = "  [dim](default)[/]" if SLOTS[f.slot].null == f.name else ""
        paper = f"{f.paper} [dim]{' '.join(f.catalogue)}[/]"
        grid.add_row(f"{f.slot}={f.name}{null}", f.traits.answers, f.summary.partition(": ")[2] or f.summary, paper)
    stdout().print(grid)


def compose(
    parts: Annotated[list[str] | None, typer.Argument(metavar="'SLOT=NAME(ARGS)'...", show_default=False)] = None,
    *,
    recipe_file: Recipe = None,
    plugin: Plugins = None,
    json_: Json = False,
) -> None:
    """Say whether techniques go together; exit status 1 when they do not."""
    from weft.compose import complete
    from weft.compose import compose as decide
    from weft.exec.build import chosen
    from weft.registry import build

    stack = complete(chosen(parts or (), recipe_file, plugin or ()))
    for part in stack:
        build(part)
    verdict = decide(stack)
    if json_:
        reasons = [{"rule": r.rule, "parts": list(r.parts), "text": r.text} for r in verdict.reasons]
        answer = {"verdict": verdict.verdict, "fidelity": verdict.fidelity.value, "redefines": list(verdict.redefines)}
        print(json.dumps({**answer, "reasons": reasons, "stack": [str(p) for p in stack]}, indent=2))
    else:
        console = stdout()
        console.print(f"{VERDICT[verdict.verdict]}, {verdict.answers}: {' '.join(str(p) for p in stack)}")
        for reason in verdict.reasons:
            console.print(f"  {reason.text}")
    if verdict.verdict == "refused":
        raise typer.Exit(1)
