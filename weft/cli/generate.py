"""`weft generate`: continue prompts from the command line, a file or stdin."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli._flags import EngineFlags, Json, spread
from weft.cli._local import load
from weft.cli._sampling import SamplingFlags
from weft.cli._terminal import interruptible, say
from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.llm import LLM
    from weft.outputs import RequestOutput
    from weft.sampling import SamplingParams

MAX_FILE_BYTES = 64 << 20
MAX_TOKENS = 256
"""Where the user names no number: a model that only continues texts seldom comes to an end by itself."""


@functools.partial(spread, sampling=SamplingFlags, flags=EngineFlags)
def generate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|PROMPT",
            help="A model, then prompts; - is a prompt from stdin.  With one argument, or where the first is no model's name, "
            "all are prompts for the bundled model.",
            show_default=False,
        ),
    ] = None,
    *,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="A prompt; may be repeated.", show_default=False),
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "--file", "-f", metavar="PATH", help="A file whose text is a prompt; may be repeated.", show_default=False
        ),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", "-n", metavar="N", help="Sequences for each prompt.", rich_help_panel="Sampling")
    ] = 1,
    logprobs: Annotated[
        int | None,
        typer.Option(
            "--logprobs", metavar="N", help="Alternatives to report for each token (with --json).", show_default=False
        ),
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end tokens.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt through the model's chat template.")] = False,
    json_: Json = False,
    sampling: SamplingFlags,
    flags: EngineFlags,
) -> None:
    """Continue prompts and print the texts; one prompt is printed as it comes."""
    model, prompts = split(arguments or [], [*(prompt or ()), *(_read(path) for path in file or ())])
    prompts = [_stdin() if text == "-" else text for text in prompts]
    if not prompts:
        raise ConfigError(
            "there is no prompt; give one, as in: weft generate 'The sea was', or - to read it from stdin"
        )
    flags.check()
    with load(model, flags) as llm:
        pass_on = {"logprobs": logprobs} if logprobs is not None else {}
        length = {} if sampling.max_tokens is not None else {"max_tokens": MAX_TOKENS}
        params = sampling.params(llm.text, **length, n=n, ignore_eos=ignore_eos, **pass_on)
        given: list[Any] = [
            {"prompt": llm.text.chat_text([{"role": "user", "content": text}]), "chat": True} if chat else text
            for text in prompts
        ]
        if len(given) == 1 and n == 1 and not json_:
            _stream(llm, given[0], params)
            return
        results = llm.generate(given, params)
    if json_:
        print(json.dumps([as_json(result) for result in results], indent=2, ensure_ascii=False))
    else:
        _print(results)


def split(arguments: Sequence[str], others: Sequence[str] = ()) -> tuple[str | None, list[str]]:
    """(model, prompts) of the command's arguments; `others` are prompts that were given by flags.

    With prompts from flags, at most one argument is left and names the model.  Else the first of several is the model, unless it
    has a space in it and is neither a folder nor a .gguf file; a single argument is a prompt, unless it clearly names a model and
    stdin has a prompt.
    """
    if others:
        if len(arguments) > 1:
            raise ConfigError("beside --prompt and --file there is room for one argument, the model")
        return (arguments[0] if arguments else None), list(others)
    if len(arguments) > 1 and (" " not in arguments[0] or _is_path(arguments[0])) and arguments[0] != "-":
        return arguments[0], list(arguments[1:])
    if len(arguments) == 1 and _names_model(arguments[0]):
        if sys.stdin.isatty():
            raise ConfigError(f"{arguments[0]} is a model; give a prompt after it, or - to read one from stdin")
        return arguments[0], ["-"]
    if not arguments and not sys.stdin.isatty():
        return None, ["-"]
    return None, list(arguments)


def as_json(result: RequestOutput) -> dict[str, Any]:
    """A result with all its outputs, as plain data; logprobs by token id."""
    return {
        "prompt": result.prompt,
        "prompt_token_ids": result.prompt_token_ids,
        "num_cached_tokens": result.num_cached_tokens,
        "outputs": [asdict(output) for output in result.outputs],
    }


def _names_model(text: str) -> bool:
    path = Path(text).expanduser()
    return text == "bundled" or (path / "config.json").is_file() or (text.endswith(".gguf") and path.is_file())


def _is_path(text: str) -> bool:
    return text.endswith(".gguf") or Path(text).is_dir()


def _stream(llm: LLM, prompt: Any, params: SamplingParams) -> None:
    """Print one text as it comes.  Ctrl-C ends it after the step in hand, with exit status 130."""
    shown = 0
    with interruptible() as stopped, contextlib.closing(llm.stream(prompt, params)) as results:  # type: ignore[type-var]
        for result in results:
            text = result.outputs[0].text
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = len(text)
            if stopped():
                break
    print(flush=True)
    if stopped():
        raise typer.Exit(130)


def _print(results: Sequence[RequestOutput]) -> None:
    """Texts with a blank line between them; on a terminal each under a line that says which it is."""
    first = True
    for at, result in enumerate(results, 1):
        for output in result.outputs:
            if not first:
                print()
            first = False
            if sys.stdout.isatty():
                which = f"prompt {at}" + (f", {output.index + 1}" if len(result.outputs) > 1 else "")
                say(f"[{which}: {output.finish_reason}]")
            print(output.text)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(
                f"{path} has more than {MAX_FILE_BYTES} bytes, which no context holds; give a shorter prompt"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a prompt ({error}); give a file of UTF-8 text") from None


def _stdin() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin is not UTF-8 text ({error})") from None
