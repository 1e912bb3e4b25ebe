"""A laboratory: stacks run over the workload on the bundled model, each once, and what came out."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from weft.compose import complete
from weft.config import Stack
from weft.conform.workload import QUESTIONS, Workload, prompts, workload
from weft.core.engine import Engine
from weft.core.ledger import blocks_for
from weft.core.noise import child_seed
from weft.errors import EngineError
from weft.exec import choices
from weft.exec.build import EngineConfig, Runtime, Setup, build, prepare
from weft.exec.mirror import Mirrored
from weft.exec.null import NullExecutor, reference
from weft.exec.thread import step
from weft.fidelity.rule import Judged
from weft.front.text import ModelText, vocabulary_of
from weft.hub import resolve
from weft.registry import Part, lookup
from weft.slots import Kept
from weft.types import Event, Finished, Grammar, Item, Rejected, RequestSpec, TokenItem, Tokens

MAX_STEPS = 20_000
Key = tuple[int, int]
Laws = dict[tuple[int, int], Tensor]
"""By (seed of the sequence, index of the token): logits [vocab], float32."""


class Failed(EngineError):
    """A stack did not do what every stack does: take every request, and end it without an error."""


@dataclass(slots=True)
class Outcome:
    """tokens: by (request id, index).  acts: by "slot=name.act".  peak_blocks: most blocks referenced at once."""

    tokens: dict[Key, list[int]] = field(default_factory=dict)
    acts: dict[str, int] = field(default_factory=dict)
    peak_blocks: int = 0
    steps: int = 0
    preemptions: int = 0
    hit_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Cut:
    """What one cut left of a sequence's entries.

    newest: whether the newest stays in every head.  turned: whether keys were turned.  closed: whether the positions of what
    stays then run on without a gap up to the newest.  kept: share of the entries that stay; mass_kept: the share of attention
    that those got, mean over layers and heads, where it was counted.
    """

    newest: bool
    turned: bool
    closed: bool
    kept: float
    mass_kept: float

    @classmethod
    def of(cls, view: Any, kept: Kept) -> Cut:
        indices = kept.indices.long().cpu()
        stay = indices.shape[-1]
        positions = view.positions.cpu()[indices].clone()
        if kept.rotate is not None:
            delta, first, stop = kept.rotate
            positions[..., first:stop] += delta
        share = 0.0
        if view.mass is not None:
            here = view.mass.gather(2, indices.expand(*view.mass.shape[:2], stay)).sum(2)
            share = float((here / view.mass.sum(2)).mean())
        closed = positions == torch.arange(view.length - stay, view.length)
        newest = bool((indices[..., -1] == view.entries - 1).all())
        return cls(newest, kept.rotate is not None, bool(closed.all()), stay / view.entries, share)


class Watched:
    """A compression whose cuts are noted."""

    def __init__(self, real: Any, found: list[Cut]) -> None:
        self._real, self._found = real, found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def keep(self, view: Any) -> Kept:
        kept: Kept = self._real.keep(view)
        self._found.append(Cut.of(view, kept))
        return kept


class Lab:
    """Runs stacks, in float32 and with bits that depend on nothing but a sequence's own context.

    alter: a change of a stack before it is built in (the tests of the tests put broken copies there).  device: cpu or cuda.
    """

    def __init__(self, alter: Callable[[Stack], Stack] | None = None, device: str = "cpu") -> None:
        self.model = resolve(None)
        self.text = ModelText.load(self.model)
        self.alter = alter
        self.device = choices.device(device)
        self._folder = Path(tempfile.mkdtemp(prefix="weft-conform-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._trials: dict[tuple[str, str, str], Part] = {}
        self._outcomes: dict[tuple[str, ...], Outcome] = {}

    def encode(self, text: str) -> list[int]:
        return self.text.tokenizer.encode(text, add_special=False)

    # ------------------------------------------------------------------ stacks

    def part(self, slot: str, name: str, kind: str = "trial") -> Part:
        """A technique with the arguments of its trial: small budgets, under which it has to work at once.

        A class says them as `trial`: a mapping, or a function of a folder of its own in which it may write files.  kind: also
        `wide_trial`, budgets that leave a technique beside it something to do (else those of the trial), and `neutral`, with
        which it changes nothing.
        """
        key = slot, name, kind
        if key not in self._trials:
            cls = lookup(slot, name)
            if kind == "wide_trial" and not hasattr(cls, kind):
                return self.part(slot, name)
            trial = getattr(cls, kind, {})
            if callable(trial):
                place = self._folder / f"{slot}-{name}-{kind}"
                place.mkdir()
                trial = trial(place)
            self._trials[key] = Part(slot, name, tuple(dict(trial).items()))
        return self._trials[key]

    def setup(self, parts: Sequence[Part], **changes: Any) -> Setup:
        """An engine that is small: steps of few rows, and a pool that a handful of the requests fill."""
        given: dict[str, Any] = {
            "max_model_len": 768,
            "max_num_seqs": 8,
            "max_rows": 192,
            "threads": 1,
            "invariant": True,
        }
        place: dict[str, Any] = {"model": self.model, "dtype": "float32", "device": self.device}
        place["draft_control"] = "off"  # what a stack does must not hang on how fast the machine is
        return prepare(EngineConfig(techniques=list(parts), **place, **{**given, **changes}))

    def runtime(self, parts: Sequence[Part], *, roomy: bool = False, **changes: Any) -> Runtime:
        setup = self.setup(parts, **changes)
        blocks = setup.plan.kv_blocks if roomy else min(setup.plan.kv_blocks, self._tight(setup))
        stack = setup.stack if self.alter is None else self.alter(setup.stack)
        planned = replace(setup, stack=stack, plan=replace(setup.plan, kv_blocks=blocks))
        return build(planned, vocabulary=self.text.vocabulary, vocabulary_of=vocabulary_of)

    def _tight(self, setup: Setup) -> int:
        """Blocks that two or three of the longest requests fill, as many entries as their stack keeps of them."""
        whole = blocks_for(setup.groups, setup.plan.max_model_len, setup.limits.max_rows)
        blocks, longest = whole + whole // 8, max(len(ids) for ids in prompts(self.encode))
        kept = setup.stack.budget(longest, longest)
        return blocks if kept == longest else blocks * kept // longest + 8

    def companions(self, parts: Sequence[Part]) -> list[tuple[int, ...]]:
        """Contexts to contrast with, for a stack whose technique asks for them."""
        wanted = max((int(getattr(lookup(p.slot, p.name), "companions", 0)) for p in parts), default=0)
        return [tuple(self.encode(text)) for text in QUESTIONS[:wanted]]

    def grammars(self, parts: Sequence[Part]) -> tuple[Grammar, ...]:
        """What outputs have to look like, for a stack whose technique holds them to it."""
        return next((tuple(x) for p in parts if (x := getattr(lookup(p.slot, p.name), "grammars", None))), ())

    def workload(self, parts: Sequence[Part], tokens: int = 24) -> Workload:
        return workload(self.encode, tokens, self.companions(parts), self.grammars(parts))

    # ------------------------------------------------------------------ live

    def run(self, parts: Sequence[Part]) -> Outcome:
        """The whole workload under a stack; remembered."""
        key = tuple(sorted(str(p) for p in parts))
        if key not in self._outcomes:
            runtime = self.runtime(parts)
            self._outcomes[key] = self.send(runtime, self.workload(parts).rounds)
        return self._outcomes[key]

    def alone(self, parts: Sequence[Part], spec: RequestSpec) -> Outcome:
        """One request with the whole engine for itself, nothing cached, in steps of another size."""
        return self.send(self.runtime(parts, roomy=True, max_rows=256, share=False), [[spec]])

    def send(self, runtime: Runtime, rounds: Sequence[Sequence[RequestSpec]]) -> Outcome:
        """Run requests round after round.  Raises Failed where one is refused or ends with an error, or nothing advances."""
        engine, outcome = runtime.engine, Outcome()
        for specs in rounds:
            events: list[Event] = []
            for spec in specs:
                events += engine.add(spec, 0.0)
            while engine.has_work:
                more, _ = step(engine, runtime.executor)
                events += more
                outcome.steps += 1
                outcome.peak_blocks = max(outcome.peak_blocks, engine.pool.referenced)
                engine.check()
                if outcome.steps > MAX_STEPS:
                    raise Failed(f"not done after {MAX_STEPS} steps: {engine.stats}")
            _take(events, outcome)
        stats = engine.stats
        if stats.kv_blocks_referenced:
            raise Failed(f"{stats.kv_blocks_referenced} blocks are still referenced when everybody has ended")
        outcome.acts, outcome.preemptions, outcome.hit_tokens = stats.acts, stats.preemptions, stats.prefix_hit_tokens
        return outcome

    def laws(
        self, parts: Sequence[Part], specs: Sequence[RequestSpec], forced: Mapping[int, Sequence[int]]
    ) -> tuple[Laws, Outcome]:
        """Logits of every output token along given texts, and what came of the run.  forced: the output of each request id."""
        runtime = self.runtime(parts, roomy=True)
        found: Laws = {}

        def probe(sequence: Mirrored, output: int, logits_V: Tensor) -> None:
            found[sequence.seed, output] = logits_V.float().cpu().clone()

        runtime.executor.watch(probe)
        sent = [
            msgspec.structs.replace(
                spec,
                n=1,
                forced=tuple(forced[spec.id]),
                sampling=msgspec.structs.replace(spec.sampling, max_tokens=len(forced[spec.id])),
            )
            for spec in specs
        ]
        return found, self.send(runtime, [sent])

    def judged(
        self, parts: Sequence[Part], specs: Sequence[RequestSpec], forced: Mapping[int, Sequence[int]]
    ) -> tuple[Laws, Judged]:
        """As `laws`, with what the stack's rule of acceptance would make of them where something was guessed, as logarithms."""
        found: list[Judged] = []

        def replaced(stack: Stack) -> Stack:
            stack = stack if self.alter is None else self.alter(stack)
            found.append(Judged(stack["accept"]))
            return replace(stack, instances={**stack.instances, "accept": found[-1]})

        lab = Lab(replaced, self.device)
        lab._trials = self._trials
        laws, _ = lab.laws(parts, specs, forced)
        return {**laws, **found[-1].found}, found[-1]

    def cuts(self, parts: Sequence[Part]) -> list[Cut]:
        """What the stack's compression kept at every cut of the workload."""
        found: list[Cut] = []

        def watched(stack: Stack) -> Stack:
            stack = stack if self.alter is None else self.alter(stack)
            real = stack.instances.get("kv.compress")
            if real is None:
                return stack
            return replace(stack, instances={**stack.instances, "kv.compress": Watched(real, found)})

        lab = Lab(watched, self.device)
        lab.send(lab.runtime(parts), self.workload(parts).rounds)
        return found

    # ------------------------------------------------------------------ simulated

    def simulate(self, parts: Sequence[Part]) -> Outcome:
        """The same requests through the deciding half alone: no model, and KV that is a chain of hashes."""
        setup = self.setup(parts)
        stack = setup.stack
        layers = len(setup.spec.layers)
        engine = Engine(setup.groups, 2 * 48, setup.limits, stack, models=_models(setup), layers=layers, vocab=256)
        executor = NullExecutor(setup.groups, vocab=256, layers=layers, stacks=engine.stacks)
        runtime = Runtime(setup, engine, executor, None, None)  # type: ignore[arg-type]
        return self.send(runtime, self.simulated_rounds(parts))

    def reference(self, parts: Sequence[Part]) -> dict[Key, list[int]]:
        """What the simulated requests' own KV gives them, computed without an engine."""
        found = {}
        for spec in (s for one in self.simulated_rounds(parts) for s in one):
            ids = [i for item in spec.items if isinstance(item, TokenItem) for i in item.ids]
            for index in range(spec.n):
                seed = child_seed(spec.seed, index)
                found[spec.id, index] = reference(ids, spec.sampling, seed, 256)
        return found

    def simulated_rounds(self, parts: Sequence[Part]) -> list[list[RequestSpec]]:
        """The workload in a vocabulary of 256 ids."""

        def small(items: tuple[Item, ...]) -> tuple[Item, ...]:
            return tuple(TokenItem(tuple(t % 256 for t in i.ids)) if isinstance(i, TokenItem) else i for i in items)

        return [
            [msgspec.structs.replace(s, items=small(s.items), companions=tuple(map(small, s.companions))) for s in one]
            for one in self.workload(parts).rounds
        ]


def _models(setup: Setup) -> tuple[str, ...]:
    return tuple(dict.fromkeys(g.model for g in setup.groups))


def _take(events: Sequence[Event], outcome: Outcome) -> None:
    for event in events:
        if isinstance(event, Rejected):
            raise Failed(f"request {event.id} was refused: {event.message}")
        if isinstance(event, Finished) and event.reason in ("error", "abort"):
            raise Failed(f"request {event.id} ended with an error: {event.error}")
        if isinstance(event, Tokens):
            outcome.tokens.setdefault((event.id, event.index), []).extend(event.tokens)


def kl(reference: Laws, other: Laws) -> list[float]:
    """KL divergence of each token's law (temperature 1) from the reference's, in nats."""
    out = []
    for key in sorted(reference):
        p = torch.log_softmax(reference[key].double(), -1)
        q = torch.log_softmax(other[key].double(), -1)
        terms = torch.where(p > -torch.inf, p.exp() * (p - q), torch.zeros(()))
        out.append(float(terms.sum()))
    return out


def stack(*parts: Part) -> list[Part]:
    """With the nulls of the slots that are left open."""
    return complete(list(parts))
