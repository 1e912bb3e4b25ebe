"""`weft calibrate`: measure the step times of a model on this machine, for simulations of it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from weft.cli._flags import EngineFlags, Json, Model, engine_flags, source_of
from weft.cli._terminal import loading, say, stderr
from weft.cli._written import written
from weft.errors import ConfigError


@engine_flags
def calibrate(
    model: Model = None,
    *,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the calibration is written.")] = Path(
        "calibration.json"
    ),
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="Times that every load is run.")] = 2,
    json_: Json = False,
    flags: EngineFlags,
) -> None:
    """Measure step times on this machine and fit a cost: weft sim --cost 'calibrated(file="FILE")'."""
    from weft.bench.calibrate import fit, measure, text
    from weft.exec.build import build, prepare
    from weft.exec.host import processor

    if rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, got {rounds}")
    flags.check()
    source, name = source_of(model)
    setup = prepare(flags.config(source))
    setup.require_fit()
    machine = {"model": name, "dtype": setup.dtype, "threads": setup.threads, "ops": setup.ops["target"].ops,
               "isa": setup.ops["target"].isa, "processor": processor()}  # fmt: skip
    with written("--out", out) as write:
        with loading(name) as progress:
            runtime = build(setup, progress)
        with _telling() as tell:
            found = fit(measure(runtime, rounds, tell))
        write(text(found, machine))
    if json_:
        print(json.dumps({**found, "machine": machine}, indent=2))
    else:
        errors = f"median error {100 * found['median_error']:.1f} %, of all {100 * found['total_error']:+.1f} %"
        say(f"{found['steps']} steps, {errors}")
        say(f"try:  weft sim --cost 'calibrated(file=\"{out}\")' --trace 'poisson(rate=2)'")


@contextlib.contextmanager
def _telling() -> Iterator[Callable[[str], None] | None]:
    """A line that says what is being measured, on a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    with stderr().status("measuring") as status:
        yield lambda text: status.update(f"measuring {text}")
