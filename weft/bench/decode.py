"""Prefill and decode speed of the engine in this process: scheduler, executor and sampler, without text and HTTP.

Each batch runs in two phases, so that neither figure holds a part of the other: every sequence is computed up to its first
token and parked, then all of them are resumed and decode together.  Prompts are random and differ, nothing is shared, nothing
ends early, and tokens are greedy unless a temperature is given.  A short run comes first and is not counted.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from weft.bench.limit import read_by, read_gb_s
from weft.core.ledger import blocks_for
from weft.errors import CapacityError, ConfigError, RequestError
from weft.exec.build import EngineConfig, Progress, Runtime, Setup, build, prepare, with_limits
from weft.exec.host import format_size, peak_rss_bytes
from weft.exec.thread import StepTimes, step
from weft.sampling import SamplingParams
from weft.types import Event, Preempted, Rejected, RequestSpec, SamplingSpec, TokenItem, Tokens

SHAPES = Path(__file__).resolve().parents[2] / "bench" / "shapes"
WARM_PROMPT, WARM_NEW = 32, 4

Tick = Callable[[str], None]
"""Called with what is being done, at most once for each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBench:
    """What to measure.  prompt, new: tokens of each sequence.  repeat: how often; medians are told.  temperature, top_p: of the
    law that tokens are drawn from."""

    batches: Sequence[int]
    prompt: int = 128
    new: int = 64
    repeat: int = 1
    seed: int = 0
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise ConfigError("--batch takes whole numbers of at least 1 with commas between them, e.g. 1,4,16")
        if self.prompt < 1:
            raise ConfigError(f"--prompt must be at least 1 token, got {self.prompt}")
        if self.new < 2:
            raise ConfigError(f"--new must be at least 2, since the first token belongs to the prompt; got {self.new}")
        if self.repeat < 1:
            raise ConfigError(f"--repeat must be at least 1, got {self.repeat}")
        try:
            SamplingParams(temperature=self.temperature, top_p=self.top_p)
        except RequestError as error:
            raise ConfigError(f"--{str(error.param).replace('_', '-')}: {error}") from None

    @property
    def sampling(self) -> SamplingSpec:
        return SamplingSpec(temperature=self.temperature, top_p=self.top_p, max_tokens=self.new)


@dataclass(frozen=True, slots=True)
class Phase:
    """One batch, once.  steps: pure decode steps, with the tokens that each gave.  tokens: of each sequence, by its request."""

    prefill_s: float
    ttft_s: list[float]
    steps: list[tuple[StepTimes, int]]
    tokens: dict[int, list[int]]


def find_shape(name: str) -> Path:
    """The configuration called `name` in `bench/shapes`, or the JSON file of that path.  Raises ConfigError."""
    path = Path(name).expanduser()
    if name.endswith(".json") or path.is_file():
        if not path.is_file():
            raise ConfigError(f"there is no file {name}; give a config.json, or a name without .json")
        return path
    known = sorted(p.stem for p in SHAPES.glob("*.json"))
    if name in known:
        return SHAPES / f"{name}.json"
    if not known:
        raise ConfigError(
            f"there is no shape {name!r}: this installation has no folder {SHAPES}; give --shape the path of a config.json"
        )
    raise ConfigError(f"there is no shape {name!r}; there are {', '.join(known)}, or give the path of a config.json")


def make_room(config: EngineConfig, bench: DecodeBench) -> Setup:
    """The set-up in which the largest batch fits the KV pool at once.

    Raises ConfigError where prompt and answer exceed the model's context, CapacityError where memory does not hold them.
    """
    length, batch = bench.prompt + bench.new, max(bench.batches)
    # Twice the sequences, as a plan never gives the pool more blocks than its sequences could fill, and admission wants to see
    # one free block beside each running sequence.
    config = replace(config, max_num_seqs=2 * batch, share=False)
    longest = prepare(config).spec.max_positions
    if length > longest:
        raise ConfigError(
            f"--prompt {bench.prompt} and --new {bench.new} make {length} tokens, and the model's context is {longest}; "
            "make them smaller"
        )
    wanted = replace(config, max_model_len=length)
    setup = prepare(wanted)
    setup.require_fit()
    plan = setup.plan
    block_bytes = plan.kv_bytes // plan.kv_blocks
    fixed_bytes = plan.total_bytes - plan.kv_bytes
    layered = bool(setup.stack["schedule"].layered)
    ahead = 2 * setup.limits.max_guesses if setup.draft is not None else 0
    blocks = batch * (1 + blocks_for(setup.groups, length, setup.limits.max_rows, layered=layered, ahead=ahead))
    room = plan.available_bytes if config.memory_bytes is None else min(plan.available_bytes, config.memory_bytes)
    if fixed_bytes + blocks * block_bytes > room:
        raise CapacityError(
            f"{batch} sequences of {length} tokens do not fit: {format_size(blocks * block_bytes)} of KV and "
            f"{format_size(fixed_bytes)} beside it, but there are {format_size(room)}; use a smaller --batch or --prompt"
        )
    # Without --memory a plan's KV pool is modest; here every sequence must have its KV at once.
    setup = prepare(replace(wanted, memory_bytes=fixed_bytes + blocks * block_bytes))
    return with_limits(setup, max_num_seqs=batch)


def ready(setup: Setup, progress: Progress | None = None) -> tuple[Runtime, float]:
    """The engine to measure, and the seconds that it took to be ready for a request, the import of torch included."""
    began = time.perf_counter()
    runtime = build(setup, progress)
    return runtime, time.perf_counter() - began


def run(
    runtime: Runtime, bench: DecodeBench, name: str, ready_s: float, tick: Tick | None = None
) -> list[dict[str, Any]]:
    """One record for each batch, in the order asked for; `limit` is measured last."""
    tell = tick or (lambda _: None)
    ids = count(1)
    warm = replace(bench, prompt=min(bench.prompt, WARM_PROMPT), new=min(bench.new, WARM_NEW))
    phase(runtime, max(bench.batches), warm, bench.seed, ids, tell)
    records = []
    for batch in bench.batches:
        phases = [phase(runtime, batch, bench, bench.seed + turn, ids, tell) for turn in range(bench.repeat)]
        records.append(_record(runtime, bench, batch, phases, name, ready_s))
    # Last, as it takes memory of its own that must not show in rss_peak_bytes.
    tell("the machine's bandwidth")
    bandwidth = read_gb_s(runtime.setup.threads, runtime.setup.device)
    for record in records:
        limit = record["limit"]
        limit["read_gb_s"] = bandwidth
        limit["fraction"] = limit["bytes_per_step"] / record["tpot_s"] / (bandwidth * 1e9)
    return records


def phase(runtime: Runtime, batch: int, bench: DecodeBench, seed: int, ids: Iterator[int], tell: Tick) -> Phase:
    """`decode` of random prompts."""
    draw, vocab = random.Random(seed), runtime.setup.spec.vocab
    prompts = [[draw.randrange(vocab) for _ in range(bench.prompt)] for _ in range(batch)]
    return decode(runtime, prompts, bench.sampling, ids, tell)


def decode(
    runtime: Runtime, prompts: Sequence[Sequence[int]], sampling: SamplingSpec, ids: Iterator[int],
    tell: Tick = lambda text: None,
) -> Phase:  # fmt: skip
    """Compute the prompts up to their first tokens, then decode them together to their ends, `max_tokens` each."""
    engine, executor, batch = runtime.engine, runtime.executor, len(prompts)
    began = time.perf_counter()
    for prompt in prompts:
        items, id = (TokenItem(tuple(prompt)),), next(ids)
        _refuse(engine.add(RequestSpec(id=id, items=items, sampling=sampling, seed=id), time.monotonic()))
    tokens: dict[int, list[int]] = {r.id: [] for r in engine.requests()}
    waiting = set(tokens)
    ttft_s: list[float] = []
    while waiting:
        tell(f"batch {batch}: prompts")
        events, _ = step(engine, executor)
        _refuse(events)
        now = time.perf_counter() - began
        for event in events:
            if isinstance(event, Tokens):
                ttft_s.append(now)
                tokens[event.id] += event.tokens
                waiting.discard(event.id)
                engine.park(event.id)
    prefill_s = time.perf_counter() - began
    for request in engine.requests():
        engine.resume(request.id, now=time.monotonic())
    steps: list[tuple[StepTimes, int]] = []
    while engine.has_work:
        tell(f"batch {batch}: decode")
        events, times = step(engine, executor)
        _refuse(events)
        got = [event for event in events if isinstance(event, Tokens)]
        for event in got:
            tokens[event.id] += event.tokens
        if len(got) == batch:
            steps.append((times, sum(len(event.tokens) for event in got)))
    return Phase(prefill_s, ttft_s, steps, tokens)


def _refuse(events: Sequence[Event]) -> None:
    for event in events:
        if isinstance(event, Rejected):
            raise CapacityError(event.message)
        if isinstance(event, Preempted):
            raise CapacityError(
                "the KV pool is too small for the batch, so the figures would mean nothing; give more --memory"
            )
        error = getattr(event, "error", None)
        if error is not None:
            raise ConfigError(error)


def _record(
    runtime: Runtime, bench: DecodeBench, batch: int, phases: Sequence[Phase], name: str, ready_s: float
) -> dict[str, Any]:
    setup = runtime.setup
    steps = [s for p in phases for s in p.steps]
    decode_tok_s = median(tokens / times.total_s for times, tokens in steps)
    read = read_by(setup, batch, bench.prompt + bench.new // 2)
    return {
        "batch": batch,
        "prefill_tok_s": batch * bench.prompt / median(p.prefill_s for p in phases),
        "decode_tok_s": decode_tok_s,
        "ttft_s": median(t for p in phases for t in p.ttft_s),
        "tpot_s": batch / decode_tok_s,
        "ready_s": ready_s,
        "rss_peak_bytes": peak_rss_bytes(),
        "model": name,
        "dtype": setup.dtype,
        "device": setup.device,
        "threads": setup.threads,
        "weights": setup.weights_name,
        "activations": setup.config.activations,
        "kv": setup.kv_name,
        "ops": setup.ops["target"].ops,
        "isa": setup.ops["target"].isa,
        "invariant": runtime.decoder.invariant,
        "stack": [str(part) for part in setup.stack.parts],
        "prompt": bench.prompt,
        "new": bench.new,
        "temperature": bench.temperature,
        "top_p": bench.top_p,
        "steps": len(steps),
        "host_s_per_step": median(times.host_s for times, _ in steps),
        "forward_s_per_step": median(times.forward_s for times, _ in steps),
        "sample_s_per_step": median(times.sample_s for times, _ in steps),
        "limit": {"bytes_per_step": read, "read_gb_s": 0.0, "fraction": 0.0},
    }
