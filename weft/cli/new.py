"""`weft new` and `weft conform`: begin a technique of your own, and test it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from weft.cli._flags import Json, Plugins
from weft.cli._terminal import say, stdout
from weft.errors import ConfigError
from weft.slots import SLOTS

STARTERS = Path(__file__).resolve().parents[1] / "starters"
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def starters() -> list[str]:
    """Slots that a file can be begun for."""
    return [slot for slot in SLOTS if (STARTERS / f"{slot}.txt").is_file()]


def begin(slot: str, name: str) -> str:
    """The text of a new technique's file.  Raises ConfigError for a slot without a starter or a name that is no module's."""
    if slot not in SLOTS:
        raise ConfigError(f"there is no slot {slot!r}; there are: {', '.join(SLOTS)}")
    if not (STARTERS / f"{slot}.txt").is_file():
        raise ConfigError(
            f"slot {slot} has no techniques yet, and so no file to begin with; there is: {', '.join(starters())}"
        )
    if not NAME.fullmatch(name):
        raise ConfigError(f"a technique's name is a Python module's: small letters, digits and _, got {name!r}")
    words = name.split("_")
    text = (STARTERS / f"{slot}.txt").read_text(encoding="utf8")
    for mark, value in (
        ("NAME", name),
        ("CLASS", "".join(map(str.title, words))),
        ("TITLE", " ".join(words).capitalize()),
    ):
        text = text.replace(f"__{mark}__", value)
    return text


def new(
    slot: Annotated[str, typer.Argument(metavar="SLOT", help="The slot that the technique fits.", show_default=False)],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name, the paper's own.", show_default=False)],
    *,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to write it, else NAME.py.", show_default=False)
    ] = None,
) -> None:
    """Write the file of a new technique: a small one that works, to be changed into yours."""
    text = begin(slot, name)
    file = out or Path(f"{name}.py")
    try:
        with file.open("x", encoding="utf8") as handle:
            handle.write(text)
    except FileExistsError:
        raise ConfigError(f"{file} exists already; name another file with --out") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error}") from None
    print(file)
    say(f"test it:  weft conform {file}")
    say(f"use it:   weft serve --plugin {file} --with '{slot}={name}'")


def conform(
    what: Annotated[
        list[str],
        typer.Argument(metavar="FILE.py|SLOT=NAME...", help="Your file, or techniques by name.", show_default=False),
    ],
    *,
    plugin: Plugins = None,
    place: Annotated[str, typer.Option("--device", help="cpu or cuda.", metavar="NAME")] = "cpu",
    json_: Json = False,
) -> None:
    """Run the generated tests of a technique on the bundled model; exit status 1 when one fails."""
    from weft.registry import load_plugin, parse

    for path in plugin or ():
        load_plugin(path)
    chosen: list[tuple[str, str]] = []
    for text in what:
        if "=" in text:
            part = parse(text)
            chosen.append((part.slot, part.name))
        else:
            chosen += load_plugin(text)
    failed = False
    told: list[dict[str, Any]] = []
    for slot, name in chosen:
        rows = _run(slot, name, place, quiet=json_)
        failed |= not all(row["ok"] for row in rows)
        told += rows
    if json_:
        print(json.dumps(told, indent=2))
    if failed:
        raise typer.Exit(1)


def _run(slot: str, name: str, device: str, *, quiet: bool) -> list[dict[str, Any]]:
    """The tests of one technique, told as they end."""
    from weft.conform.checks import conform as tests
    from weft.conform.lab import Lab
    from weft.registry import lookup

    lookup(slot, name)
    console = stdout()
    if not quiet:
        console.print(f"[bold]{slot}={name}[/]")
    began, rows = time.monotonic(), []
    for result in tests(Lab(device=device), slot, name):
        rows.append(
            {
                "technique": f"{slot}={name}",
                "test": result.test,
                "ok": result.ok,
                "text": result.text,
                "seconds": round(result.seconds, 3),
            }
        )
        if not quiet:
            mark = "[green]ok    [/]" if result.ok else "[bold red]failed[/]"
            console.print(f"  {mark} {result.test:<20} ", end="")
            console.print(result.text, markup=False, highlight=False)
    if not quiet:
        bad = sum(not row["ok"] for row in rows)
        console.print(f"  {len(rows) - bad} hold, {bad} do not, in {time.monotonic() - began:.0f} s")
    return rows
