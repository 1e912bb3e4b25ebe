"""`weft check`: does this checkpoint, run by weft, give what the transformers package gives?  A user's own proof."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli._flags import EngineFlags, Json, Model, engine_flags
from weft.cli._terminal import loading, say, stderr, stdout
from weft.errors import CapacityError, ConfigError, RequestError

if TYPE_CHECKING:
    from weft.cli._compare import Comparison
    from weft.exec.build import Setup
    from weft.front.text import ModelText

LONG_TOKENS = 512
"""Length of the prompt that is made of all the others, where the model's context allows it."""
MAX_FILE_BYTES = 64 << 20


@engine_flags
def check(
    model: Model = None,
    *,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE", help="Prompts: a JSON list of strings, or one on each line; else weft's own."
        ),
    ] = None,
    new: Annotated[int, typer.Option("--new", metavar="N", help="Greedy tokens after each prompt.", min=1)] = 32,
    json_: Json = False,
    flags: EngineFlags,
) -> None:
    """Compare logits and greedy tokens with the transformers package; exit status 1 when they differ.

    In float32 (the default) the logits of every position must agree within 1e-4, or in proportion where logits exceed 10.  In 16
    bits they must agree within a sixteenth of the largest logit, and nine of ten likeliest tokens must be equal.  Greedy
    tokens must be equal but for ties within twice those bounds.
    """
    from weft.cli import _reference

    flags.check()
    _reference.require()
    texts = read_prompts(prompts)
    found, name = _run(model, flags, texts, new)
    if json_:
        print(json.dumps({**found.as_json(), "model": name}, indent=2))
    else:
        _print(found, name)
    if not found.passed:
        raise typer.Exit(1)


def _run(model: str | None, flags: EngineFlags, texts: Sequence[str] | None, new: int) -> tuple[Comparison, str]:
    from dataclasses import replace

    from weft.cli._compare import compare
    from weft.cli._reference import Reference
    from weft.exec.build import build, prepare
    from weft.front.text import ModelText
    from weft.hub import model_id, resolve

    if flags.load == "random":
        raise ConfigError("--load random leaves nothing to compare with; leave it out")
    name = model_id(model)
    folder = resolve(model, progress=sys.stderr.isatty())
    dtype = "float32" if flags.dtype == "auto" else flags.dtype
    config = replace(flags.config(folder), dtype=dtype, share=False)
    setup = prepare(config)
    text = ModelText.load(folder, max_model_len=setup.limits.max_model_len, name=name)
    ids = prompt_ids(text, texts, setup.limits.max_model_len - 1, new)
    _require_room(setup)
    with loading(f"{name} in weft") as progress:
        runtime = build(setup, progress)
    with loading(f"{name} in transformers"):
        reference = Reference(folder, setup.threads)
    with stderr().status("comparing") if sys.stderr.isatty() else _quiet():
        return compare(runtime, reference.logits, ids, new), name


def read_prompts(path: Path | None) -> list[str] | None:
    """The prompts of a file, or None for weft's own.  Raises ConfigError."""
    if path is None:
        return None
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} has more than {MAX_FILE_BYTES} bytes; give fewer prompts")
        text = path.read_text(encoding="utf-8")
        found: Any = (
            json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
        )
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); give a JSON list of strings, or one prompt on each line"
        ) from None
    if not isinstance(found, list) or not found or not all(isinstance(p, str) and p for p in found):
        raise ConfigError(f"{path} has no prompts; give a JSON list of strings, or one prompt on each line")
    return found


def prompt_ids(text: ModelText, texts: Sequence[str] | None, most: int, new: int) -> list[list[int]]:
    """Token ids of the prompts.  Of weft's own, those that fit, and one made of all of them, up to LONG_TOKENS."""
    from weft.cli._prompts import PROMPTS

    if texts is not None:
        try:
            return [text.prompt_ids(p) for p in texts]
        except RequestError as error:
            raise ConfigError(f"--prompts: {error}") from None
    encode = text.tokenizer.encode
    ids = [encode(p, add_special=True) for p in (*PROMPTS, "\n\n".join(PROMPTS * 2))]
    ids[-1] = ids[-1][: min(LONG_TOKENS, max(1, most - new))]
    fitting = [i for i in ids if 0 < len(i) <= most]
    if not fitting:
        raise ConfigError(
            f"the context of {most + 1} tokens is too short for every prompt; give your own with --prompts"
        )
    return fitting


def _require_room(setup: Setup) -> None:
    """Both models are in memory at once.  Raises CapacityError, naming the numbers."""
    from weft.exec.host import available_memory, format_size
    from weft.models.layout import weights_bytes

    setup.require_fit()
    theirs = weights_bytes(setup.spec, "float32")
    ours = setup.plan.total_bytes if setup.device == "cpu" else 0
    room = available_memory().bytes
    if ours + theirs > room:
        raise CapacityError(
            f"weft check holds the model twice: {format_size(ours)} for weft and {format_size(theirs)} for transformers "
            f"in float32, but {format_size(room)} are available; try a smaller --max-model-len or more memory"
        )


def _print(found: Comparison, name: str) -> None:
    from rich.table import Table

    told = found.as_json()
    grid = Table(title=f"{name}: weft and transformers", title_justify="left", title_style="bold", show_header=False)
    grid.add_row("prompts, positions", f"{found.prompts}, {found.positions:,}")
    grid.add_row("largest difference of logits", f"{found.max_abs_logit_diff:.2e} (allowed: {found.tolerance:.2e})")
    grid.add_row("same likeliest token", f"{100 * told['top1_agreement']:.2f} % of positions")
    ties = f", {found.ties} ties" if found.ties else ""
    grid.add_row("greedy continuations equal", ("yes" if found.greedy_equal else "[red]no[/]") + ties)
    grid.add_section()
    grid.add_row("", "[green]pass[/]" if found.passed else "[bold red]fail[/]")
    stdout().print(grid)
    for w in found.wrong[:5]:
        say(
            f"prompt {w['prompt']}, token {w['token']}: weft wrote {w['ours']}, transformers {w['reference']}, by {w['gap']:.3g}"
        )


def _quiet() -> Any:
    import contextlib

    return contextlib.nullcontext()
