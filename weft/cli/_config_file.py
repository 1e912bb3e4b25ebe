"""`--config FILE.toml`: flags of a command by their names, read before the command line, which wins."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from weft.errors import ConfigError

SECRETS = frozenset({"api-key", "admin-key"})
MAX_BYTES = 1 << 20


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the command that it is given to.  Raises ConfigError."""
    if path is None:
        return None
    found = defaults(path, context.command.params)
    for parameter in context.command.params:
        if parameter.name in found and parameter.callback is None:
            try:  # typer says what is wrong, and nothing of the file
                parameter.process_value(context, found[parameter.name])
            except typer.BadParameter as error:
                name, value = parameter.name.replace("_", "-"), str(found[parameter.name])
                raise ConfigError(f"{path}: {name} = {value[:80]!r}: {error.message}") from None
    context.default_map = {**(context.default_map or {}), **found}
    return path


def defaults(path: Path, parameters: Any) -> dict[str, Any]:
    """Values by the parameters' own names.  Raises ConfigError for a name that there is not, with the nearest one."""
    given = _read(path)
    known: dict[str, tuple[Any, bool]] = {}
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            known[parameter.name] = parameter, True
        for options, value in ((parameter.opts, True), (parameter.secondary_opts, False)):
            known |= {o[2:]: (parameter, value) for o in options if o.startswith("--")}
    for name in ("config", "help"):
        known.pop(name, None)
    found: dict[str, Any] = {}
    for written, value in given.items():
        name = written.replace("_", "-")
        if name not in known:
            close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{path}: there is no flag --{name[:80]}{hint}")
        parameter, positive = known[name]
        if parameter.name in found:
            raise ConfigError(f"{path}: {name} is said twice")
        found[parameter.name] = _value(path, name, value, parameter, positive)
    if SECRETS & {name.replace("_", "-") for name in given}:
        from weft.front.keys import check_mode

        check_mode(path)
    return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read ({error.strerror or error})") from None
    if len(text) > MAX_BYTES:
        raise ConfigError(f"--config {path} is longer than {MAX_BYTES} bytes")
    try:
        return tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is no TOML: {error}") from None


def _value(path: Path, name: str, value: Any, parameter: Any, positive: bool) -> Any:
    """A value as the command line would have it: text, or a list of texts, or a truth value.  Raises ConfigError."""
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise ConfigError(f"{path}: {name} is true or false, got {value!r}")
        return value is positive
    many = bool(getattr(parameter, "multiple", False)) or getattr(parameter, "nargs", 1) != 1
    values = value if isinstance(value, list) else [value]
    if any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in values):
        raise ConfigError(f"{path}: {name} is a number or a text{', or a list of them' if many else ''}")
    if many:
        return [str(one) for one in values]
    if isinstance(value, list):
        raise ConfigError(f"{path}: {name} is given once and is no list")
    return str(value)
