"""`weft sim`: a trace through the engine's own scheduler under a virtual clock, on machines that need not be here."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from weft.cli._flags import Json, Plugins, spread
from weft.cli._terminal import stderr, stdout
from weft.cli._written import written
from weft.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from weft.sim.metrics import Meter
    from weft.sim.run import Tell, Wanted


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, show_default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimFlags:
    """What a user may say about what is simulated."""

    trace: Annotated[
        str | None,
        _option("--trace", help="A trace, a folder of them, or 'poisson(rate=4, requests=1000)'.", metavar="FILE"),
    ] = None
    policy: Annotated[
        str,
        _option(
            "--policy", help="A schedule, route or placement; several with + between them. (fcfs)", metavar="NAME(ARGS)"
        ),
    ] = "fcfs"
    hardware: Annotated[
        str, _option("--hardware", help="A device by name, or FILE.toml:NAME. (h100)", metavar="NAME")
    ] = "h100"
    model: Annotated[
        str, _option("--model", help="A shape by name, a folder, or a config.json. (llama-3.1-8b)", metavar="NAME")
    ] = "llama-3.1-8b"
    cost: Annotated[
        str,
        _option(
            "--cost",
            help="What prices a step: roofline, calibrated, table, or a way to spread it. (roofline)",
            metavar="NAME(ARGS)",
        ),
    ] = "roofline"
    replicas: Annotated[int, _option("--replicas", help="Engines behind the router. (1)", metavar="N")] = 1
    devices: Annotated[
        int, _option("--devices", help="Devices that compute one replica's model together. (1)", metavar="N")
    ] = 1
    slo: Annotated[
        str | None,
        _option("--slo", help="What a good request meets, as in ttft=1s,tpot=50ms,gap=200ms.", metavar="SLO"),
    ] = None
    draws: Annotated[int, _option("--seed", help="Of everything that is drawn. (0)", metavar="N")] = 0
    time_scale: Annotated[float, _option("--time-scale", help="Times the trace's own pace. (1)", metavar="X")] = 1.0
    rate_scale: Annotated[
        float, _option("--rate-scale", help="Times the trace's requests, at its own pace. (1)", metavar="X")
    ] = 1.0
    requests: Annotated[int | None, _option("--requests", help="Stop after so many requests.", metavar="N")] = None
    duration: Annotated[str | None, _option("--duration", help="Stop after so long, as in 10m.", metavar="TIME")] = None
    seqs: Annotated[int, _option("--max-num-seqs", help="Sequences computed at once. (256)", metavar="N")] = 256
    rows: Annotated[int, _option("--max-num-batched-tokens", help="Rows of one step. (2048)", metavar="N")] = 2048
    longest: Annotated[
        int | None, _option("--max-model-len", help="Longest context; else the model's own.", metavar="N")
    ] = None
    kv_blocks: Annotated[
        int | None,
        _option("--kv-blocks", help="Blocks of the KV pool; else what the device's memory holds.", metavar="N"),
    ] = None
    block_tokens: Annotated[int, _option("--block-tokens", help="Tokens of a block. (16)", metavar="N")] = 16
    weight_bits: Annotated[
        float, _option("--weight-bits", help="Bits of a parameter; else those of the model's dtype.", metavar="N")
    ] = 0.0
    encoder: Annotated[
        str, _option("--encoder", help="What encodes images, where a load has some. (internvit-6b)", metavar="NAME")
    ] = "internvit-6b"
    peak: Annotated[
        str | None,
        _option("--peak", help="Limits at the device's peaks for contexts of these lengths; no trace.", metavar="N,N"),
    ] = None
    kept: Annotated[
        str | None,
        _option("--kv-kept", help="Shares of KV that stay, for --peak, as in layers=0.5,bits=0.25.", metavar="SHARES"),
    ] = None
    share: Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache", help="Share the KV of equal prefixes. (yes)", show_default=False
        ),
    ] = True

    def wanted(self) -> Wanted:
        """As the simulator takes it.  Raises ConfigError."""
        from weft.sim.metrics import seconds, slo
        from weft.sim.run import Wanted
        from weft.sim.workload import Pace

        if self.trace is None:
            raise ConfigError("give a load with --trace: a file, a folder, or 'poisson(rate=4, requests=1000)'")
        limit = None if self.duration is None else seconds(self.duration)
        pace = Pace(time=self.time_scale, rate=self.rate_scale, requests=self.requests, seconds=limit)
        return Wanted(
            trace=self.trace, policy=self.policy, hardware=self.hardware, model=self.model, cost=self.cost,
            replicas=self.replicas, devices=self.devices, slo=slo(self.slo), pace=pace, seed=self.draws,
            max_num_seqs=self.seqs, max_rows=self.rows, max_model_len=self.longest,
            block_tokens=self.block_tokens, blocks=self.kv_blocks, weight_bits=self.weight_bits, share=self.share,
            encoder=self.encoder, encode=text_encoder(),
        )  # fmt: skip

    def only(self, flag: str, used: Sequence[str], more: Sequence[str]) -> None:
        """Raises ConfigError where a flag was given that would be left unused beside `flag`.  used: names of fields that are not.

        more: flags that are no fields and were given.
        """
        hints = get_type_hints(SimFlags, include_extras=True)
        given = [f.name for f in fields(self) if f.name not in used and getattr(self, f.name) != f.default]
        # Typer keeps the first name that an annotation gives in the place of a default.
        named = [str(hints[name].__metadata__[0].default) for name in given]
        unused = [
            *(name.partition("/")[-1] or name for name in named),
            *more,
        ]  # of --prefix-cache/--no-prefix-cache the second
        if unused:
            raise ConfigError(f"{flag} simulates no load, and would leave {', '.join(unused)} unused; leave that out")


PEAK = ("peak", "kept", "hardware", "model", "devices", "block_tokens", "weight_bits")
"""Fields that --peak reads."""


def text_encoder() -> Callable[[str], list[int]]:
    """Text to ids by the bundled model's tokenizer, which is loaded when the first text comes."""

    @functools.lru_cache(maxsize=1)
    def tokenizer() -> Any:
        from weft.front.tokenizer import Tokenizer
        from weft.hub import resolve

        return Tokenizer.load(resolve(None))

    return lambda text: list(tokenizer().encode(text)) if text else []


@functools.partial(spread, flags=SimFlags)
def sim(
    *,
    compare: Annotated[
        str | None, _option("--compare", help="Policies to compare, with commas between them.", metavar="A,B")
    ] = None,
    rates: Annotated[
        str, _option("--rates", help="Times the trace's pace at which they are compared. (1)", metavar="X,X")
    ] = "1",
    report: Annotated[
        Path | None, _option("--report", help="Write the comparison as a page with charts.", metavar="FILE.html")
    ] = None,
    place: Annotated[
        str | None,
        _option(
            "--proportions",
            help="A placement: compare every number of replicas for prompts, the best first.",
            metavar="NAME",
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        _option(
            "--replay", help="Hold a new engine's decisions against a record of weft serve --record.", metavar="FILE"
        ),
    ] = None,
    plugin: Plugins = None,
    json_: Json = False,
    flags: SimFlags,
) -> None:
    """Simulate a load: the scheduler that serves, line for line, under a virtual clock.

    With --replay nothing is simulated; exit status 1 when a decision is not the recorded one, 3 when the record is cut and none
    differs.
    """
    from weft.registry import load_plugin

    for path in plugin or ():
        load_plugin(path)
    several = {
        "--compare": compare,
        "--proportions": place,
        "--rates": None if rates == "1" else rates,
        "--report": report,
    }
    more = [flag for flag, given in several.items() if given is not None]
    if replay is not None:
        flags.only("--replay", (), more)
        replayed(replay, json_)
    elif flags.peak is not None:
        flags.only("--peak", PEAK, more)
        peaks(flags, json_)
    elif flags.kept is not None:
        raise ConfigError(
            "--kv-kept says what --peak keeps of KV; give it the length of a context with --peak, or leave it out"
        )
    elif more:
        compared(flags.wanted(), compare, place, rates, report, json_)
    else:
        single(flags.wanted(), json_)


def single(wanted: Wanted, json_: bool) -> None:
    """Print what comes of one policy at the load's own pace."""
    from weft.sim.run import run

    with _telling() as tell:
        result, _ = run(wanted, tell)
    if json_:
        print(json.dumps(result, indent=2))
    else:
        console = stdout()
        console.print(table({wanted.policy: result}, console.width))


def compared(
    wanted: Wanted, compare: str | None, place: str | None, rates: str, report: Path | None, json_: bool
) -> None:
    """Print what comes of each policy, and of each proportion of a placement, at each pace; of these the best first."""
    from weft.sim.placement import proportions
    from weft.sim.report import page
    from weft.sim.run import compare as simulate
    from weft.sim.run import split

    chosen = split(compare, ",") if compare is not None else []
    chosen += proportions(wanted, place) if place is not None else []
    with _telling() as tell, written("--report", report) as write:
        points = simulate(wanted, chosen or [wanted.policy], numbers(rates), tell)
        if place is not None:
            points.sort(key=lambda p: (p.rate, -p.result["goodput"]))
        if report is not None:
            write(page(points, wanted))
    if json_:
        found = [{"policy": p.policy, "rate": p.rate, "offered": p.offered, **p.result} for p in points]
        print(json.dumps(found, indent=2))
    else:
        console = stdout()
        console.print(table({f"{p.policy} at {p.rate:g}": p.result for p in points}, console.width))


CUT = 3
"""Exit status of a replay that found nothing different in a record that is cut."""


def replayed(path: Path, json_: bool) -> None:
    """Print what a record holds and the first difference.  Exits with status 1 where there is one, and with 3 where there is none
    in a record that is cut."""
    from weft.sim.replay import replay

    found = replay(path)
    if json_:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        told = {k: v for k, v in found.as_dict().items() if isinstance(v, int) and k not in ("identical", "at")}
        print(", ".join(f"{v:,} {k.replace('_', ' ')}" for k, v in told.items()))
        if found.difference is not None:
            print(found.difference)
        elif found.cut is None:
            print("every decision is the recorded one")
        else:
            print(
                f"the record is cut: {found.cut}. Its engine still runs, failed or was killed, its disk was full, or the file "
                f"lost its end later. The decisions of the {found.steps:,} steps before that are the recorded ones; of what came "
                "after them nothing is known"
            )
    if found.difference is not None or found.cut is not None:
        raise typer.Exit(1 if found.difference is not None else CUT)


def peaks(flags: SimFlags, json_: bool) -> None:
    """Print what the device could do at best, by length of the context."""
    from rich.table import Table

    from weft.sim.machines import hardware, model
    from weft.sim.peak import contexts, peak, shares

    device = hardware(flags.hardware, flags.devices)
    shape = model(flags.model, block_tokens=flags.block_tokens, weight_bits=flags.weight_bits).figures
    found = [peak(device, shape, n, shares(flags.kept)) for n in contexts(flags.peak or "")]
    if json_:
        print(json.dumps([p.as_dict() for p in found], indent=2))
        return
    grid = Table("context", "KV", "users", "prefill", "a token", "out and in", "session", "bound by")
    for p in found:
        grid.add_row(
            f"{p.context:,}", f"{p.kv_bytes / 1e9:,.2f} GB", f"{p.users:,}", f"{p.prefill_s:,.2f} s",
            f"{1e3 * p.decode_s:,.1f} ms", f"{p.switch_s:,.3f} s", f"{p.session_s:,.1f} s", p.bound_by,
        )  # fmt: skip
    stdout().print(grid)


def numbers(text: str) -> list[float]:
    """'0.5,1,2' as numbers above 0.  Raises ConfigError."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < x < 1e9 for x in found):
        raise ConfigError(f"--rates takes numbers above 0 with commas between them, as in 0.5,1,2; got {text[:80]!r}")
    return found


def table(results: dict[str, dict[str, Any]], width: int = 200) -> Table:
    """Results for people.  A terminal that is narrow has no room for what bounds the steps; figures are never cut."""
    from rich import box
    from rich.table import Table

    wide = width >= 110
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column("policy", overflow="fold", min_width=18)
    for column in ("finished", "good /s", "TTFT p50", "p99", "TPOT p50", "p99", "tokens/s"):
        grid.add_column(column, justify="right", no_wrap=True)
    if wide:
        grid.add_column("bound by", no_wrap=True)
    for name, r in results.items():
        bound = sorted(r["bound_by"].items(), key=lambda x: -x[1])[:2]
        grid.add_row(
            name, f"{r['finished']:,}" + (f"/{r['requests']:,}" if r["finished"] != r["requests"] else ""),
            f"{r['goodput']:.2f}", *(_time(r[key][q]) for key in ("ttft_s", "tpot_s") for q in ("p50", "p99")),
            f"{r['output_tok_s']:,.0f}", *([", ".join(f"{p} {100 * x:.0f} %" for p, x in bound)] if wide else []),
        )  # fmt: skip
    return grid


def _time(seconds: float) -> str:
    """In milliseconds with three digits, up to ten seconds."""
    if seconds >= 10:
        return f"{seconds:,.1f} s" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


@dataclass(frozen=True, slots=True)
class _Far:
    """How far a simulation has come, looked at whenever the terminal is drawn."""

    text: str
    meter: Meter

    def __rich__(self) -> Text:
        from rich.text import Text

        m = self.meter
        return Text(f"simulating {self.text}: {m.done:,} of {len(m.arrived):,} requests that came, {m.last_s:,.0f} s")


@contextlib.contextmanager
def _telling() -> Iterator[Tell | None]:
    """A line that says what is being simulated and how far that has come, on a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    with stderr().status("getting ready") as status:
        yield lambda text, meter: status.update(_Far(text, meter))
