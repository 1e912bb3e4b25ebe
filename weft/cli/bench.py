"""`weft bench`: measurements, beside the limit of the machine they were made on."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import bench_serve
from weft.cli._flags import EngineFlags, Json, engine_flags, source_of
from weft.cli._terminal import loading, stderr, stdout
from weft.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Measure speed, beside the limit of this machine.")


@app.callback()
def bench() -> None:
    """Measure speed, beside the limit of this machine."""


@app.command("decode")
@engine_flags
def decode(
    *,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="A folder, a Hugging Face id, or bundled.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="NAME", help="A config.json, or its name in bench/shapes; random weights."),
    ] = None,
    batch: Annotated[
        str, typer.Option("--batch", metavar="N,N", help="Sequences at once, one run for each.")
    ] = "1,4,16",
    prompt: Annotated[int, typer.Option("--prompt", metavar="N", help="Prompt tokens of each sequence.")] = 128,
    new: Annotated[int, typer.Option("--new", metavar="N", help="Tokens that each sequence generates.")] = 64,
    repeat: Annotated[int, typer.Option("--repeat", metavar="N", help="Runs of each batch; medians are printed.")] = 1,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="Of the draws; 0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", metavar="P", help="Of the draws; 1 keeps every token.")] = 1.0,
    json_: Json = False,
    flags: EngineFlags,
) -> None:
    """Prefill and decode speed of the engine, without HTTP, and how much of the memory bandwidth decoding reaches."""
    from weft.bench.decode import DecodeBench, find_shape, make_room, ready, run

    if (model is None) == (shape is None):
        raise ConfigError("give one of --model and --shape, for example --shape qwen2.5-0.5b or --model bundled")
    plan = DecodeBench(
        batches=batches(batch), prompt=prompt, new=new, repeat=repeat, temperature=temperature, top_p=top_p
    )
    refuse_flags(flags)
    flags.check()
    source, name = source_of(str(find_shape(shape)) if shape is not None else model)
    setup = make_room(flags.config(source), plan)
    with loading(name) as progress:
        runtime, ready_s = ready(setup, progress)
    with _progress() as tick:
        records = run(runtime, plan, name, ready_s, tick)
    if json_:
        print(json.dumps(records, indent=2))
    else:
        stdout().print(table(records))


app.command("serve")(bench_serve.serve)


def batches(text: str) -> tuple[int, ...]:
    """'1,4,16' as numbers.  Raises ConfigError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--batch takes whole numbers with commas between them, e.g. 1,4,16; got {text!r}") from None


def refuse_flags(flags: EngineFlags) -> None:
    """Say of flags that the measurement sets itself that it does.  Raises ConfigError."""
    for name, value, instead in (
        ("--max-num-seqs", flags.max_num_seqs, "it is the largest --batch"),
        ("--max-model-len", flags.max_model_len, "it is --prompt + --new"),
        ("--prefix-cache", flags.prefix_cache or None, "prompts are computed, never shared"),
    ):
        if value is not None:
            raise ConfigError(f"{name} is not free here: {instead}; leave it out")


def table(records: list[dict[str, Any]]) -> Table:
    """The records for people."""
    from rich.table import Table

    from weft.exec.host import format_size

    first = records[0]
    title = (
        f"{first['model']}, {first['weights']}{', inputs in 8 bits' if first['activations'] == 'int8' else ''}, "
        f"{first['threads']} threads, ops {first['ops']}"
        f"{' (invariant)' if first['invariant'] else ''}; {first['prompt']} prompt + {first['new']} new tokens"
    )
    grid = Table(title=title, title_justify="left", title_style="bold")
    for column in ("batch", "prefill tok/s", "decode tok/s", "TTFT", "TPOT", "host / step", "read / step", "of limit"):
        grid.add_column(column, justify="right", no_wrap=True)
    for r in records:
        grid.add_row(
            str(r["batch"]), f"{r['prefill_tok_s']:,.0f}", f"{r['decode_tok_s']:,.1f}", f"{1e3 * r['ttft_s']:,.1f} ms",
            f"{1e3 * r['tpot_s']:,.2f} ms", f"{1e3 * r['host_s_per_step']:.2f} ms",
            format_size(r["limit"]["bytes_per_step"]), f"{100 * r['limit']['fraction']:.1f} %",
        )  # fmt: skip
    grid.caption = (
        f"this machine reads {first['limit']['read_gb_s']:.1f} GB/s; ready in {first['ready_s']:.1f} s; "
        f"peak memory {format_size(max(r['rss_peak_bytes'] for r in records))}"
    )
    grid.caption_justify = "left"
    return grid


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None] | None]:
    """A line that says what is being measured, on a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    with stderr().status("getting ready") as status:
        yield lambda text: status.update(f"measuring {text}")
