"""An environment for each rival, made on first use in the cache, by pip from PyPI."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.rivals.process import RivalError, run
from bench.rivals.processor import cpuinfo

MADE = "made.json"
Tick = Callable[[str], None]


def environment(
    name: str, recipe: Mapping[str, Any], cache: Path, tick: Tick = lambda text: None, pip_args: Sequence[str] = ()
) -> Path:
    """The Python of a rival's environment, which is made where it is not there or its recipe has changed.

    recipe: `install`, lists of pip's arguments, one after the other; `check`, what Python must be able to run after that; and
    as needed `build_env`, `build_env_with` and `timeout_s`.  pip's words go to `install.log` beside the environment.
    Raises RivalError.
    """
    recipe = {**recipe, "build_env": build_env(recipe)}
    folder = cache / name
    venv, made, log = folder / "venv", folder / MADE, folder / "install.log"
    python = venv / "bin" / "python"
    version = list(sys.version_info[:2])
    wanted = {"recipe": digest(recipe), "python": version}
    if python.exists() and made.is_file() and json.loads(made.read_text(encoding="utf8")) == wanted:
        return python
    folder.mkdir(parents=True, exist_ok=True)
    made.unlink(missing_ok=True)
    shutil.rmtree(venv, ignore_errors=True)
    log.write_bytes(b"")
    timeout_s = float(recipe.get("timeout_s", 1800))

    def step(what: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        tick(f"{name}: {what}")
        run(argv, log, timeout_s, env, lambda gone_s: tick(f"{name}: {what}, {gone_s:.0f} s"))

    try:
        step("making an environment", [sys.executable, "-m", "venv", str(venv)])
        for arguments in recipe["install"]:
            pip = [str(python), "-m", "pip", "install", "--progress-bar", "off", "--no-input", *pip_args, *arguments]
            step(f"installing {label(arguments)}", pip, recipe["build_env"])
        step("looking whether it starts", [str(python), "-c", recipe["check"]])
    except RivalError as error:
        raise RivalError(f"not installed: {error}") from None
    made.write_text(json.dumps(wanted), encoding="utf8")
    return python


def build_env(recipe: Mapping[str, Any]) -> dict[str, str] | None:
    """What pip's builds get in their environment: `build_env`, and behind it what `build_env_with` has for instruction
    sets that this processor has."""
    found: dict[str, str] | None = recipe.get("build_env")
    here = cpuinfo().get("flags", "").split()
    for instructions, more in recipe.get("build_env_with", {}).items():
        if instructions in here:
            found = dict(found or {})
            for key, text in more.items():
                found[key] = f"{found.get(key, '')} {text}".strip()
    return found


def label(arguments: Sequence[str]) -> str:
    """What a list of pip's arguments installs, in a few words."""
    names = [a for a in arguments if not a.startswith("-")]
    return f"{len(names)} packages" if len(names) > 3 else ", ".join(names)


def digest(recipe: Mapping[str, Any]) -> str:
    """Changes when the environment would."""
    parts = {key: recipe.get(key) for key in ("install", "build_env", "check")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
