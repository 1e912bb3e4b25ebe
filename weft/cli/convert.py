"""`weft convert`: a checkpoint in few bits, for weft and for every engine that reads compressed-tensors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli._flags import MODEL_HELP, Json
from weft.cli._terminal import loading, say, stdout, unwinding
from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.convert.awq import Changes
    from weft.models.formats import WeightFormat

WINDOW = 512
WINDOWS = 32
MAX_TEXT_BYTES = 64 << 20
LEAST_TOKENS = 512


def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.", show_default=False)],
    *,
    few: Annotated[
        str,
        typer.Option(
            "--weights",
            metavar="FORMAT",
            help="int8 or int4; with a group, int4:64; with offsets, int4:64:zero; with float scales, int4:64:float.",
            show_default=False,
        ),
    ],
    awq: Annotated[
        Path | None,
        typer.Option("--awq", metavar="TEXTFILE", help="Calibrate on this text first (AWQ).", show_default=False),
    ] = None,
    json_: Json = False,
) -> None:
    """Write a checkpoint whose matrices have few bits, as compressed-tensors packs them; everything else is copied."""
    from weft.models.formats import WeightFormat

    form = WeightFormat.parse(few)
    text = None if awq is None else _read(awq)
    record = run(model, out, form, text)
    if json_:
        print(json.dumps(record, indent=2))
    else:
        _print(record)


def run(model: str, out: Path, form: WeightFormat, text: str | None) -> dict[str, Any]:
    """The record of `weft convert --json`.  Raises ConfigError and CapacityError."""
    from weft.convert.folder import copy_rest, made, require_room
    from weft.convert.write import convert as write
    from weft.convert.write import source_of
    from weft.exec.host import format_size
    from weft.hub import resolve
    from weft.models.layout import parameters

    folder = resolve(model, progress=sys.stderr.isatty())
    spec = source_of(folder, form).spec
    require_room(out, parameters(spec) * form.bits // 8 * 5 // 4, format_size)
    with unwinding(), made(out) as draft:
        changes = None if text is None else calibrated(folder, form, text)
        left = copy_rest(folder, draft)
        with loading(f"{folder.name} into {form}", "converting", "converted") as progress:
            written = write(folder, draft, form, changes, progress)
    record: dict[str, Any] = {"model": str(folder), "out": str(out), "weights": str(form), "awq": text is not None}
    return record | written.as_json() | {"left_out": left}


def calibrated(folder: Path, form: WeightFormat, text: str) -> Changes:
    """AWQ's changes, from windows spread over a text.  Raises ConfigError where the text is too short."""
    from weft.convert.awq import calibrate
    from weft.convert.passes import Along, windows
    from weft.front.text import ModelText
    from weft.models import load_spec
    from weft.models.checkpoints.stored import catalogue
    from weft.models.families import families

    spec = load_spec(folder)
    length = min(WINDOW, spec.max_positions)
    tokenizer = ModelText.load(folder, max_model_len=spec.max_positions, name=folder.name).tokenizer
    ids = tokenizer.encode(text, add_special=False)
    if len(ids) < LEAST_TOKENS:
        raise ConfigError(
            f"--awq needs a text of at least {LEAST_TOKENS} tokens, this has {len(ids)}; {WINDOW * WINDOWS} are used"
        )
    stored = catalogue(folder)
    parts = families()[spec.family].parts(spec)
    dtypes = {part.target: stored[part.name].dtype for part in parts if len(part.shape) == 1 and part.name in stored}
    along = Along(folder, spec, length, wanted=False)
    with loading(f"{form} on {len(ids):,} tokens", "calibrating", "calibrated", bytes_=False) as progress:
        return calibrate(along, windows(ids, length, WINDOWS), form, dtypes, progress)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise ConfigError(f"--awq {path} has more than {MAX_TEXT_BYTES >> 20} MiB; a few thousand lines are enough")
        return path.read_text(encoding="utf8", errors="replace")
    except OSError as error:
        raise ConfigError(f"--awq {path} cannot be read: {error.strerror}") from None


def _print(record: dict[str, Any]) -> None:
    from weft.exec.host import format_size

    before, after = record["bytes_before"], record["bytes_after"]
    how = ", calibrated" if record["awq"] else ""
    stdout().print(
        f"{record['out']}: {record['rounded']} matrices in {record['weights']}{how}, {record['kept']} tensors as they were; "
        f"{format_size(before)} became {format_size(after)}"
    )
    if record["left_out"]:
        say(f"left out: {', '.join(record['left_out'])}")
    say(f"try it: weft generate {record['out']} 'Once upon a time'")
