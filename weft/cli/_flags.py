"""The flags that every command with an engine takes, in one place: name, help, and what they become.

    @engine_flags
    def serve(model: Model = None, *, flags: EngineFlags, port: ... = 8000) -> None: ...

gives `serve` one option for each field of `EngineFlags`, in the place of the parameter `flags`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from weft.errors import ConfigError

ENGINE = "Engine"
MODEL_HELP = (
    "A folder, a .gguf file, a Hugging Face id, or nothing (or [b]bundled[/b]) for the model that comes with weft."
)

Model = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} Several have an engine each.", show_default=False),
]
Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        metavar="FILE.py",
        help="A Python file of yours with techniques; may be repeated.",
        show_default=False,
    ),
]
Recipe = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="A TOML file with a stack.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")]


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=ENGINE, show_default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFlags:
    """What a user may say about an engine; None means that weft decides.  See `weft.exec.build.EngineConfig`."""

    dtype: Annotated[str, _option("--dtype", help="auto, float32, bfloat16, or float16 on a GPU.", metavar="NAME")] = (
        "auto"
    )
    device: Annotated[str, _option("--device", help="auto, cpu or cuda.", metavar="NAME")] = "auto"
    max_model_len: Annotated[
        int | None,
        _option("--max-model-len", help="Longest context in tokens, prompt and answer together.", metavar="N"),
    ] = None
    memory: Annotated[
        str | None,
        _option("--memory", help="All that weft may take, e.g. [b]8G[/b]; sizes are powers of 1024.", metavar="SIZE"),
    ] = None
    threads: Annotated[
        int | None,
        _option(
            "--threads",
            help="CPU threads; else all that this process may use, or one for a very small model.",
            metavar="N",
        ),
    ] = None
    ops: Annotated[
        str | None, _option("--ops", help="auto, cpu (weft's own kernels) or ref (plain PyTorch).", metavar="NAME")
    ] = None
    isa: Annotated[
        str | None,
        _option(
            "--isa",
            help="Instructions of the kernels: auto, amx, avx512_bf16, avx512_vnni, avx512, avx2 or portable.",
            metavar="NAME",
        ),
    ] = None
    weights: Annotated[
        str | None,
        _option(
            "--weights",
            help="Round the weights while loading: int8 or int4, with a group such as [b]int4:128[/b].",
            metavar="FORMAT",
        ),
    ] = None
    activations: Annotated[
        str | None,
        _option(
            "--activations",
            help="float, or int8: with --weights, round the inputs of products too; faster, less exact.",
            metavar="FORMAT",
        ),
    ] = None
    kv: Annotated[
        str | None,
        _option("--kv", help="Keys and values: auto (as --dtype), float32, bfloat16 or int8.", metavar="FORMAT"),
    ] = None
    draft_control: Annotated[
        str | None,
        _option(
            "--draft-control",
            help="on, or off: guess as far ahead as the draft likes, also where it does not pay. (on)",
            metavar="WHETHER",
        ),
    ] = None
    max_num_seqs: Annotated[
        int | None, _option("--max-num-seqs", help="Sequences computed at once; more wait. (64)", metavar="N")
    ] = None
    max_num_batched_tokens: Annotated[
        int | None, _option("--max-num-batched-tokens", help="Rows of one step over all sequences. (512)", metavar="N")
    ] = None
    load: Annotated[
        str, _option("--load", help="auto, or random for random weights of the model's shape.", metavar="HOW")
    ] = "auto"
    weights_seed: Annotated[
        int | None, _option("--weights-seed", help="Seed of the weights of --load random. (0)", metavar="N")
    ] = None
    prefix_cache: Annotated[
        bool | None,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Share the KV of equal prefixes between requests. (yes)",
            rich_help_panel=ENGINE,
            show_default=False,
        ),
    ] = None
    invariant: Annotated[
        bool | None,
        typer.Option(
            "--invariant/--no-invariant",
            help="Results that do not depend on the batch, to the last bit. (yes in float32 on a CPU)",
            rich_help_panel=ENGINE,
            show_default=False,
        ),
    ] = None
    techniques: Annotated[
        list[str] | None,
        _option("--with", help="Put a technique in a slot, e.g. [b]schedule=prefill_first[/b]; may be repeated.",
                metavar="'SLOT=NAME(ARGS)'"),
    ] = None  # fmt: skip
    recipe: Annotated[
        Path | None,
        _option("--recipe", help="A TOML file with a stack; what --with names goes before it.", metavar="FILE"),
    ] = None
    plugins: Annotated[
        list[Path] | None,
        _option("--plugin", help="A Python file of yours with techniques; may be repeated.", metavar="FILE.py"),
    ] = None

    lora: Annotated[
        list[str] | None,
        _option("--lora", help="Load an adapter (a folder as peft writes it); may be repeated.", metavar="NAME=FOLDER"),
    ] = None
    max_loras: Annotated[
        int | None, _option("--max-loras", help="Adapters that may be loaded at once. (8)", metavar="N")
    ] = None
    lora_memory: Annotated[
        str | None,
        _option(
            "--lora-memory", help="Set this aside for adapters; else they take what the plan leaves.", metavar="SIZE"
        ),
    ] = None

    def options(self) -> dict[str, Any]:
        """As keywords of `weft.LLM`; what the user left open is left out."""
        renamed = {"weights_seed": "seed", "prefix_cache": "enable_prefix_caching"}
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {renamed.get(name, name): value for name, value in given.items() if value is not None}

    def config(self, source: Path | Mapping[str, Any]) -> Any:
        """The `EngineConfig` of a model's folder, or of a bare config, which gets random weights.

        Raises ConfigError for a size that cannot be read, before anything else is looked at.
        """
        from weft.exec.build import engine_config

        bare = {} if isinstance(source, Path) else {"load": "random"}
        return engine_config(source, {**self.options(), **bare})

    def check(self) -> None:
        """Look at what can be wrong without a model, so that it is said before anything is fetched.  Raises ConfigError."""
        from weft.config import build_stack
        from weft.exec.build import chosen
        from weft.exec.host import parse_size

        for flag, size in (("--memory", self.memory), ("--lora-memory", self.lora_memory)):
            if size is not None:
                parse_size(size, flag)
        if self.load not in ("auto", "random"):
            raise ConfigError(f"--load is auto or random, got {self.load!r}")
        build_stack(chosen(self.techniques or (), self.recipe, self.plugins or ()))


def engine_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `flags: EngineFlags` by one parameter for each of its fields."""
    return spread(command, flags=EngineFlags)


def spread(command: Callable[..., None], **groups: Any) -> Callable[..., None]:
    """Replace each named parameter, which takes an instance of a dataclass, by the dataclass's own fields."""
    hints = get_type_hints(command, include_extras=True)
    parameters = [
        p.replace(annotation=hints[p.name])
        for p in inspect.signature(command).parameters.values()
        if p.name not in groups
    ]
    for group in groups.values():
        own = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=own[f.name])
            for f in fields(group)
        ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        built = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**built, **given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    del run.__wrapped__  # else the signature would be read from there
    return run


def source_of(model: str | None, *, weights: bool = True) -> tuple[Path | dict[str, Any], str]:
    """(folder, or the contents of a config file; the name to show) of a MODEL.  Raises ConfigError."""
    from weft.hub import model_id, resolve

    if model is not None and model.endswith(".json") and Path(model).expanduser().is_file():
        from weft.models import load_config

        path = Path(model).expanduser()
        return load_config(path), path.stem if path.stem != "config" else path.resolve().parent.name
    return resolve(model, weights=weights), model_id(model)
