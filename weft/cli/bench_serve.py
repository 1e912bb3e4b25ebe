"""`weft bench serve`: load on any server that speaks OpenAI's protocol."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli._flags import Json
from weft.cli._terminal import stderr, stdout
from weft.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from rich.table import Table

    from weft.bench.dataset import Ask
    from weft.bench.serve import Load, Sample

DEFAULT_CLIENTS = 8


def serve(
    *,
    url: Annotated[str, typer.Option("--url", metavar="URL", help="Of the server.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Of the model there; else the first that it lists.")
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", metavar="N", help="Clients that each ask again at once; 8 without --rate."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option("--rate", metavar="X", help="Requests a second at random times, whether or not it keeps up."),
    ] = None,
    requests: Annotated[int, typer.Option("--requests", metavar="N", min=1, help="How many in all.")] = 100,
    dataset: Annotated[
        Path | None,
        typer.Option("--dataset", metavar="FILE", help="Prompts: .jsonl, .json (ShareGPT too) or lines; else made up."),
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", metavar="N", min=1, help="Words of a made-up prompt.")] = 100,
    answer: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Of an answer, where the data says nothing.")
    ] = 64,
    route: Annotated[str, typer.Option("--route", metavar="NAME", help="chat or completions.")] = "chat",
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Every answer has all its tokens (servers that know the field).")
    ] = False,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", help="Of the server; else WEFT_API_KEY.")
    ] = None,
    draw: Annotated[int, typer.Option("--seed", metavar="N", help="Of arrivals, order and made-up prompts.")] = 0,
    timeout: Annotated[float, typer.Option("--timeout", metavar="S", help="Seconds for one answer.")] = 600.0,
    json_: Json = False,
) -> None:
    """What clients of a server see: time to the first token, between tokens and to the end, throughput, errors."""
    from weft.bench.client import Target
    from weft.bench.dataset import made_up, read_dataset
    from weft.bench.serve import Load, summary

    load = Load(
        concurrency=DEFAULT_CLIENTS if concurrency is None and rate is None else concurrency, rate=rate,
        max_tokens=answer, route=route, seed=draw, extra={"ignore_eos": True} if ignore_eos else {},
    )  # fmt: skip
    if timeout <= 0:
        raise ConfigError(f"--timeout must be above 0, got {timeout}")
    asks = made_up(requests, prompt, draw) if dataset is None else read_dataset(dataset, requests, draw)
    target = Target(url, api_key or os.environ.get("WEFT_API_KEY") or None, timeout)
    name, samples, seconds = asyncio.run(_measure(target, model, asks, load))
    record = summary(samples, seconds, load, url=url, model=name)
    if json_:
        print(json.dumps(record, indent=2))
    else:
        stdout().print(table(record))
    failed = next((s for s in samples if s.error is not None), None)
    if failed is not None and not json_:
        stderr().print(f"the first error was {failed.message}", markup=False)
    if record["errors"] == record["requests"]:
        raise EngineError("no request was answered")


async def _measure(target: Any, model: str | None, asks: list[Ask], load: Load) -> tuple[str, list[Sample], float]:
    from weft.bench.serve import first_model, run

    try:
        name = model or await first_model(target)
        if not sys.stderr.isatty():
            return name, *await run(target, name, asks, load)
        from rich.progress import Progress

        with Progress(console=stderr(), transient=True) as bar:
            task = bar.add_task("requests", total=len(asks))
            return name, *await run(target, name, asks, load, lambda done: bar.update(task, completed=done))
    finally:
        target.close()


def table(record: dict[str, Any]) -> Table:
    """The record for people."""
    from rich.table import Table

    how = f"{record['rate']:g} requests/s" if record["rate"] else f"{record['concurrency']} clients"
    grid = Table(
        title=f"{record['model']} at {record['url']}, {how}, {record['requests']} requests", title_justify="left",
        title_style="bold",
    )  # fmt: skip
    for column in ("", "mean", "p50", "p90", "p99", "max"):
        grid.add_column(column, justify="right", no_wrap=True)
    for title, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("end to end", "e2e_s")):
        values = record[key]
        if values is not None:
            grid.add_row(title, *(f"{1e3 * values[c]:,.1f} ms" for c in ("mean", "p50", "p90", "p99", "max")))
    kinds = ", ".join(f"{count} x {kind}" for kind, count in record["error_kinds"].items())
    grid.caption = (
        f"{record['output_tok_s']:,.1f} tokens/s and {record['requests_s']:,.2f} answers/s over {record['duration_s']:.1f} s; "
        f"{record['errors']} errors{f' ({kinds})' if kinds else ''}"
    )
    grid.caption_justify = "left"
    return grid
