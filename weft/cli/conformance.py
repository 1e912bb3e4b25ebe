"""`weft conformance`: what weft does with the samples of others, counted."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Annotated

import typer

from weft.cli._flags import Json
from weft.cli._terminal import stdout
from weft.errors import ConfigError

DATA = Path("../shared/data")
"""Beside the checkout; what lies there belongs to others and is never in the package."""


def suites() -> list[str]:
    """Names of the suites: the modules of weft.conformance that have a `run`."""
    package = importlib.import_module("weft.conformance")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "count")


def conformance(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="schema, tools or templates.", show_default=False)],
    *,
    data: Annotated[
        Path, typer.Option("--data", metavar="FOLDER", help="Where the suites' data lies: schema/, tools/, templates/.")
    ] = DATA,
    json_: Json = False,
) -> None:
    """Count what weft does with the samples of a suite; exit status 1 when one is accepted or rejected wrongly."""
    if suite not in suites():
        raise ConfigError(f"there is no suite {suite!r}; there are: {', '.join(suites())}")
    count = importlib.import_module(f"weft.conformance.{suite}").run(data)
    if json_:
        print(json.dumps(count.as_dict(), indent=2))
    else:
        console = stdout()
        said = ", ".join(f"{key} {value}" for key, value in count.as_dict().items() if key != "suite")
        console.print(f"[bold]{suite}[/]: {said}", highlight=False)
        for text in count.wrong:
            console.print(f"  {text}", markup=False, highlight=False)
    if not count.ok:
        raise typer.Exit(1)
