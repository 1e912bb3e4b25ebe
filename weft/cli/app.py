"""The command tree, `--version`, and the one place where an error of weft becomes a sentence and an exit status."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from weft import __version__
from weft.cli import (
    bench,
    calibrate,
    chat,
    check,
    conformance,
    convert,
    doctor,
    features,
    fidelity,
    generate,
    new,
    plan,
    policies,
    serve,
    sim,
    soak,
)
from weft.cli._terminal import complain
from weft.errors import CapacityError, ConfigError, EngineError, RequestError


class Commands(TyperGroup):
    """The commands of weft: what weft raises on purpose ends in one sentence on stderr, anything else in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EngineError as error:
            complain(str(error) or type(error).__name__)
            raise typer.Exit(exit_status(error)) from None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)  # in the order in which they are added below, not by the alphabet


def exit_status(error: EngineError) -> int:
    """2 for what the user must write differently, 1 for everything that was well asked and did not work."""
    return 2 if isinstance(error, ConfigError | RequestError) and not isinstance(error, CapacityError) else 1


def _version(wanted: bool) -> None:
    if wanted:
        print(f"weft {__version__}")
        raise typer.Exit(0)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="MODEL is a folder, a .gguf file, a Hugging Face id, or nothing (the bundled one).  weft COMMAND --help lists flags.",
)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """An inference and serving engine for language models."""


app.command("serve")(serve.serve)
app.command("chat")(chat.chat)
app.command("generate")(generate.generate)
app.command("plan")(plan.plan)
app.command("check")(check.check)
app.command("doctor")(doctor.doctor)
app.command("features")(features.features)
app.command("compose")(features.compose)
app.command("fidelity")(fidelity.fidelity)
app.command("convert")(convert.convert)
app.command("sim")(sim.sim)
app.command("policies")(policies.policies)
app.command("calibrate")(calibrate.calibrate)
app.command("new")(new.new)
app.command("conform")(new.conform)
app.command("conformance")(conformance.conformance)
app.command("soak")(soak.soak)
app.add_typer(bench.app, name="bench")
