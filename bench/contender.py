"""A stack under a load, and the engine that runs it: what a benchmark compares.

Legend.  tok: tokens.  A wave is as many prompts as run at once.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import msgspec

from weft.bench.decode import DecodeBench, make_room
from weft.core.request import State
from weft.errors import CapacityError, ConfigError, EngineError
from weft.exec.build import EngineConfig, Runtime, Setup, build, prepare, with_limits
from weft.exec.host import peak_rss_bytes
from weft.exec.thread import step
from weft.front.text import ModelText, vocabulary_of
from weft.registry import load_plugin
from weft.types import Event, Finished, Grammar, Preempted, Rejected, RequestSpec, SamplingSpec, TokenItem, Tokens

ROOT = Path(__file__).resolve().parents[1]
EMPTY_STEPS = 1000
"""Steps in which nothing ran, after which a case is taken to be stuck."""


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint to measure on.  name: as the results call it.  large: a step takes so long that loads are cut short.

    folder: of the checkpoint, or a config.json, which gets random weights.
    grown: its weights are most of what is resident, so that is not measured for each case.
    """

    name: str
    folder: Path
    grown: bool = False
    large: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One stack under one load.

    name        what the results call it
    prompts     token ids of each sequence
    techniques  as 'slot=name(args)'; the nulls of all other slots come by themselves
    sampling    fields of `SamplingSpec` beside max_tokens; greedy where it is empty
    max_new     tokens of each answer; nothing ends earlier unless `sampling` has stop_ids
    batch       sequences at once; the prompts are run in as many waves as that takes
    engine      further fields of `EngineConfig`.  memory_bytes makes the pool as small as that; else the batch fits it at once
    n           answers that are returned to each prompt
    seats       sequences that one prompt takes at once, where a search or a contrast makes it more than n
    own         parts that each prompt lays over the stack, in turns: prompt i has own[i % len(own)]
    companions  a second context for each prompt, where the stack contrasts
    plugins     files that register techniques which no installation has, such as a draft that knows the answer
    grammar     what every answer has to look like
    piece       steps of decoding after which others have their turn, whose time is not counted; 0: a whole wave.  Neighbours on
                the machine disturb it for a second or so, which then meets everyone
    bound       whether it stands for the most that can be had, and not for the technique as it is used
    apart       whether a wave's prompts are all computed, and parked, before any of its sequences decodes.  Then prefill and
                decode are measured apart; else decode_tok_s is over the whole time.  False where the batch does not fit the
                pool, since parked sequences then lose their blocks, and their prompts are computed again as part of decoding

    Raises ConfigError for a load without prompts, with an empty one, or with less than two tokens to decode.
    """

    name: str
    prompts: Sequence[Sequence[int]]
    techniques: Sequence[str] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_new: int = 64
    batch: int = 1
    n: int = 1
    seats: int = 1
    own: Sequence[Sequence[str]] = ()
    companions: Sequence[Sequence[int]] = ()
    engine: Mapping[str, Any] = field(default_factory=dict)
    apart: bool = True
    plugins: Sequence[str] = ()
    bound: bool = False
    grammar: Grammar | None = None
    piece: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or not all(self.prompts):
            raise ConfigError(f"case {self.name}: give at least one prompt, and no empty ones")
        if self.companions and len(self.companions) != len(self.prompts):
            raise ConfigError(f"case {self.name}: give each prompt a companion, or none")
        if self.max_new < 2 or self.batch < 1:
            raise ConfigError(f"case {self.name}: max_new must be at least 2 and batch at least 1")

    @property
    def together(self) -> int:
        """Sequences of a full wave."""
        return min(self.batch, len(self.prompts))


@dataclass(slots=True)
class Run:
    """One pass over a case's prompts.

    decode_cpu_s: what the process's threads took of the processor, which neighbours on the machine disturb less than the clock.
    steps: of each decode step its seconds, its tokens, and the sequences that got some.  kv_blocks: most that were referenced
    at once.  tokens: by prompt.  first_s: of each prompt the seconds from its wave's beginning to its first token.
    """

    prefill_s: float = 0.0
    prefill_tok: int = 0
    decode_s: float = 0.0
    decode_cpu_s: float = 0.0
    decode_tok: int = 0
    steps: list[tuple[float, int, int]] = field(default_factory=list)
    kv_blocks: int = 0
    preemptions: int = 0
    tokens: dict[int, list[int]] = field(default_factory=dict)
    first_s: list[float] = field(default_factory=list)

    def figures(self, block_bytes: int) -> dict[str, float]:
        """What a result tells of a run: prefill_tok_s where the phases were apart, else ttft_s and step_p95_s."""
        told = {
            "decode_tok_s": self.decode_tok / self.decode_s,
            "decode_tok_cpu_s": self.decode_tok / self.decode_cpu_s,
            "step_s": median(seconds for seconds, _, _ in self.steps),
            "tok_per_step": sum(tok for _, tok, _ in self.steps) / sum(count for _, _, count in self.steps),
            "kv_peak_bytes": float(self.kv_blocks * block_bytes),
            "preemptions": float(self.preemptions),
        }
        if self.prefill_s:
            return told | {"prefill_tok_s": self.prefill_tok / self.prefill_s}
        slow = sorted(seconds for seconds, _, _ in self.steps)
        return told | {"ttft_s": fmean(self.first_s), "step_p95_s": slow[math.ceil(0.95 * len(slow)) - 1]}


class Contender:
    """A case with its own engine, built as `weft serve` builds one.  like: another one, whose weights it reads too."""

    def __init__(self, model: Model, case: Case, threads: int, like: Contender | None = None) -> None:
        self.case = case
        self.runtime: Runtime = build(
            setup(model, case, threads),
            like=None if like is None else like.runtime,
            vocabulary=lambda: ModelText.load(model.folder).vocabulary(),
            vocabulary_of=vocabulary_of,
        )
        self.runs: list[Run] = []
        self._ids = 0
        self._wave_began = 0.0

    def acts(self) -> dict[str, int]:
        """What the stack's techniques did so far, by 'slot=name.act'."""
        return self.runtime.engine.stacks.acts()

    def run(self, turn: int) -> Run:
        """Every prompt once.  turn: a prefix that one turn left in the cache is not found by another."""
        found = Run()
        for _ in self.waves(turn, found):
            pass
        return found

    def waves(self, turn: int, found: Run) -> Iterator[None]:
        """`run` wave by wave, or piece by piece, so that others may run between."""
        count = len(self.case.prompts)
        for start in range(0, count, self.case.batch):
            yield from self._wave(range(start, min(start + self.case.batch, count)), turn, found)
            yield

    def _wave(self, which: range, turn: int, found: Run) -> Iterator[None]:
        case, engine = self.case, self.runtime.engine
        began = self._wave_began = time.perf_counter()
        places: dict[int, int] = {}
        for index in which:
            self._ids += 1
            places[self._ids] = index
            sampling = SamplingSpec(**{"temperature": 0.0, **case.sampling, "max_tokens": case.max_new})
            items = (TokenItem(tuple(case.prompts[index])),)
            beside = tuple((TokenItem(tuple(ids)),) for ids in case.companions[index : index + 1])
            spec = RequestSpec(
                id=self._ids, items=items, sampling=sampling, seed=index, salt=turn.to_bytes(8, "little"), n=case.n,
                companions=beside, techniques=tuple(case.own[index % len(case.own)]) if case.own else (), grammar=case.grammar,
            )  # fmt: skip
            _refuse(engine.add(spec, time.monotonic()))
        if case.apart:
            self._prompts(places, found)
            found.prefill_s += time.perf_counter() - began
            found.prefill_tok += sum(len(case.prompts[i]) for i in which)
            for request in engine.requests():
                if request.state is State.PARKED:  # a companion goes on with its leader
                    engine.resume(request.id, request.index, now=time.monotonic())
            if case.piece:
                yield
            began = time.perf_counter()
        cpu_began, steps = time.process_time(), 0
        drawn = engine.stats.generation_tokens
        while engine.has_work:
            if case.piece and steps == case.piece:
                found.decode_s += time.perf_counter() - began
                found.decode_cpu_s += time.process_time() - cpu_began
                yield
                began, cpu_began, steps = time.perf_counter(), time.process_time(), 0
            steps += 1
            before = time.perf_counter()
            events = self._step(places, found)
            took = time.perf_counter() - before
            got = [len(e.tokens) for e in events if isinstance(e, Tokens) and e.tokens]
            # A search draws tokens, one for each of its sequences, of which it tells when it has ended.
            total = engine.stats.generation_tokens
            new, drawn = total - drawn, total
            if new:
                found.steps.append((took, new, len(got) if new == sum(got) else new))
            found.decode_tok += new
        found.decode_s += time.perf_counter() - began
        found.decode_cpu_s += time.process_time() - cpu_began

    def _prompts(self, places: Mapping[int, int], found: Run) -> None:
        """Every sequence up to its first token, where it is parked."""
        waiting = set(places)
        while waiting:
            events = self._step(places, found)
            ended = {e.id for e in events if isinstance(e, Finished)}
            for event in events:
                if isinstance(event, Tokens) and event.id in waiting:
                    waiting.discard(event.id)
                    if event.id not in ended:
                        self.runtime.engine.park(event.id)

    def _step(self, places: Mapping[int, int], found: Run) -> list[Event]:
        """One step in which something happens.  places: the prompt of each request."""
        engine = self.runtime.engine
        for _ in range(EMPTY_STEPS):
            events, _ = step(engine, self.runtime.executor)
            found.kv_blocks = max(found.kv_blocks, engine.pool.referenced)
            _refuse(events)
            for event in events:
                if isinstance(event, Tokens):
                    if places[event.id] not in found.tokens:
                        found.first_s.append(time.perf_counter() - self._wave_began)
                    found.tokens.setdefault(places[event.id], []).extend(event.tokens)
                found.preemptions += isinstance(event, Preempted)
            if events or engine.stats.rows or not engine.has_work:
                return events
        raise EngineError(f"case {self.case.name}: nothing moves although requests live; please report this")


def setup(model: Model, case: Case, threads: int) -> Setup:
    """What the case's engine is built from.  The pool holds the batch at once, unless the case says how much memory there is."""
    for file in case.plugins:
        load_plugin(file)
    longest = max(len(p) for p in (*case.prompts, *case.companions))
    batch = case.together * max(case.n, case.seats, 1 + bool(case.companions))
    weights = "random" if model.folder.is_file() else "auto"
    given = {"threads": threads, "share": False, "load": weights, "draft_control": "off", **case.engine}
    config = EngineConfig(model=model.folder, techniques=tuple(case.techniques), **given)
    if config.memory_bytes is None:
        found = make_room(config, DecodeBench(batches=[batch], prompt=longest, new=case.max_new))
        return replace(found, config=replace(found.config, share=config.share))
    # Twice the sequences, as a plan never gives the pool more blocks than its sequences could fill.
    found = prepare(replace(config, max_model_len=longest + case.max_new, max_num_seqs=2 * batch))
    found.require_fit()
    return with_limits(found, max_num_seqs=batch)


def rss_bytes(model: Model, case: Case, threads: int) -> int:
    """The most that is resident in a process of its own that builds the case's engine and runs it once."""
    load = msgspec.json.encode({"name": model.name, "folder": str(model.folder), "case": case, "threads": threads})
    done = subprocess.run([sys.executable, "-m", __name__], input=load, capture_output=True, cwd=ROOT)
    if done.returncode:
        raise EngineError(f"case {case.name} failed in a process of its own: {done.stderr.decode(errors='replace')}")
    return int(done.stdout)


def _refuse(events: Sequence[Event]) -> None:
    for event in events:
        if isinstance(event, Rejected):
            raise CapacityError(event.message)
        if isinstance(event, Finished) and event.error is not None:
            raise EngineError(event.error)


def _child() -> None:
    """A process of its own: a load on stdin, the peak on stdout."""
    load = msgspec.json.decode(sys.stdin.buffer.read())
    case = msgspec.convert(load["case"], Case)
    Contender(Model(load["name"], Path(load["folder"])), case, load["threads"]).run(0)
    print(peak_rss_bytes())


if __name__ == "__main__":
    _child()
