"""`weft soak`: a server under requests whose answers are known, while its engine dies, stands still and is cut off."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from weft.cli._flags import Json, Model
from weft.cli._terminal import complain, say


def soak(
    model: Model = None,
    *,
    requests: Annotated[int, typer.Option("--requests", metavar="N", min=1, help="Requests in all.")] = 1000,
    faults: Annotated[int, typer.Option("--faults", metavar="F", min=0, help="Faults among them.")] = 30,
    seed_: Annotated[int, typer.Option("--seed", metavar="S", help="Of what is asked when, and what breaks.")] = 0,
    json_: Json = False,
) -> None:
    """Serve, ask, and break things; exit status 1 when a request is lost, a token wrong, or a block leaked."""
    from weft.soak.run import Soak

    with tempfile.TemporaryDirectory(prefix="weft-soak-") as folder:
        report = Soak(requests, faults, seed_, model=model, tell=say).run(Path(folder))
    found = report.as_dict()
    if json_:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{name:34} {value}")
    if report.bad:
        complain(f"{report.lost} requests lost, {report.wrong} tokens wrong, {report.leaked} blocks leaked")
        raise typer.Exit(1)
