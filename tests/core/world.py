"""A world for engines under test: KV groups of every kind, an executor that misbehaves on request, and a model of every sequence.

The executor keeps real hash-chain KV behind block tables (see `weft.exec.null`) and audits every entry that a work could read.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from weft.core import noise
from weft.core.engine import Engine
from weft.errors import InvariantError
from weft.exec.mirror import Mirrored
from weft.exec.null import EMPTY, NullExecutor, draw, inputs, step
from weft.slots import Guesses
from weft.types import (
    Event,
    Finished,
    GroupKind,
    GroupSpec,
    KVOp,
    KVOpKind,
    Plan,
    RequestSpec,
    SamplingSpec,
    Span,
    StepResult,
    TokenItem,
    TokenLogprob,
    Tokens,
    Work,
    WorkResult,
)

LAYERS = 4
VOCAB = 12
"""Few ids, so that random guesses are often right and prefixes often meet."""
MAX_LEN = 64


def groups(*, models: int = 1, parked: bool = True) -> list[GroupSpec]:
    """Full and sliding groups of unlike block sizes; the draft model has both as well."""

    def group(name: str, kind: GroupKind, size: int, window: int | None = None, model: str = "target") -> GroupSpec:
        layers = (0, 1) if kind is GroupKind.FULL else (2, 3)
        return GroupSpec(
            name=name, kind=kind, layers=layers, entry_bytes=8, block_tokens=size, window=window, model=model
        )

    out = [group("full", GroupKind.FULL, 4), group("window", GroupKind.WINDOW, 2, 9)]
    if parked:
        out.append(group("parked", GroupKind.PARKED, 8))
    if models == 2:
        out += [group("draft", GroupKind.FULL, 8, model="draft"), group("draft7", GroupKind.WINDOW, 4, 7, "draft")]
    return out


def cut_rule(prompt: int, position: int) -> int | None:
    """Cuts in the middle of the prompt, at its end, and after every fifth token from there."""
    for at in (prompt // 2, prompt):
        if position < at:
            return at
    return prompt + 5 * ((position - prompt) // 5 + 1)


def origin_of(salt: bytes) -> int:
    """Tenants have KV of their own, so that a hit across tenants gives wrong tokens."""
    return noise.mix(1 + int.from_bytes(salt, "little")) if salt else EMPTY


class Executor(NullExecutor):
    """short: chance of a short result.  right: chance that a guess is right, None for no guesses.  cut: compress there.

    salts: by rid, kept up to date by whoever submits.  failing: rids whose next work fails.  losing: chance that a block is not
    saved, or not loaded.  gone: tickets that were lost.
    """

    def __init__(
        self, specs: Sequence[GroupSpec], rnd: random.Random, *, cut: Callable[[int, int], int | None] | None = None
    ) -> None:
        super().__init__(specs, vocab=VOCAB, layers=LAYERS)
        self.rnd, self.cut = rnd, cut
        self.short = 0.0
        self.right: float | None = None
        self.losing = 0.0
        self.gone: set[int] = set()
        self.salts: dict[int, bytes] = {}
        self.failing: set[int] = set()
        self.leaders: dict[int, int] = {}
        """By link: whose draw the linked sequences of the last step shared."""

    def execute(self, plan: Plan) -> StepResult:
        self.leaders = {}
        result = super().execute(plan)
        told = []
        for work, fact in zip(plan.works, result.works, strict=True):
            rows = min(work.prompt_rows, fact.rows)
            if rows:
                s = self.mirror.sequences[work.request]
                known = tuple(
                    TokenLogprob(int(s.tokens[work.start + i + 1]), float(work.start + i + 1), 1) for i in range(rows)
                )
                fact = msgspec.structs.replace(fact, prompt_logprobs=known)
            told.append(fact)
        return msgspec.structs.replace(result, works=tuple(told))

    def origin(self, request: int) -> int:
        return origin_of(self.salts[request])

    def loses(self, ticket: int) -> bool:
        if self.rnd.random() >= self.losing:
            return False
        self.gone.add(ticket)
        return True

    def _carry_out(self, op: KVOp) -> Iterator[tuple[int, tuple[int, ...]]]:
        known = {ticket for ticket, _ in self.stored.values()}
        if op.kind is KVOpKind.LOAD and not self.gone.issuperset(set(op.argument) - known):
            raise InvariantError("a block is loaded that was never saved, or was written over")
        return super()._carry_out(op)

    def rows(self, work: Work) -> int:
        planned = work.count - work.guesses
        return self.rnd.randrange(planned) if planned and self.rnd.random() < self.short else planned

    def further(self, work: Work, tokens: Sequence[int]) -> Sequence[int]:
        """Some of the tokens, and after them guesses of its own, which nobody may take for what stands."""
        stand = tokens[: self.rnd.randrange(len(tokens) + 1)]
        for g in self.members(work):
            size = self.groups[g].block_tokens
            for slot in self.mirror.slots(work, g, work.ahead)[len(work.tokens) + len(stand) :]:
                self.memory[divmod(int(slot), size)] = self.rnd.getrandbits(60)
        return stand

    def propose(self, work: Work, state: int, output: int) -> Guesses:
        """A chain, or after every other token a tree of any shape."""
        if self.right is None:
            return Guesses(())
        s, out, parents, states, depth = self.mirror.sequences[work.request], list[int](), list[int](), [state], [0]
        for i in range(self.rnd.randrange(5)):
            at = 1 + (noise.mix(state + i) % (i + 1) - 1 if state & 1 else i - 1)
            token = draw(states[at], s.sampling, s.seed, output + depth[at], VOCAB)
            if self.rnd.random() >= self.right:
                token = self.rnd.randrange(VOCAB)
            out.append(token)
            parents.append(at - 1)
            states.append(step(states[at], token))
            depth.append(depth[at] + 1)
        return Guesses(out, parents=parents if state & 1 else ())

    def _sample(self, work: Work, states: list[int], count: int, shared: dict[int, int]) -> WorkResult:
        if work.link is not None:
            self.leaders.setdefault(work.link, work.request)
        return super()._sample(work, states, count, shared)

    def _work(self, work: Work, shared: dict[int, int]) -> WorkResult:
        s = self.mirror.sequences[work.request]
        done: int = s.state.setdefault(work.model, work.start)  # type: ignore[assignment]
        if work.request in self.failing:
            self.failing.discard(work.request)
            return WorkResult(rows=0, failed="told to fail")
        if work.start > done:
            # Planned on top of a short result that nobody knew of: its rows are garbage, and so is what it says.
            for g in self.members(work):
                for slot in self.mirror.slots(work, g):
                    block, offset = divmod(int(slot), self.groups[g].block_tokens)
                    self.memory[block, offset] = self.rnd.getrandbits(60)
            return WorkResult(rows=work.count, tokens=(self.rnd.randrange(VOCAB),) if work.samples else ())
        if work.start < done:
            raise InvariantError(f"sequence {work.request}: rows from {work.start} on stand already, up to {done}")
        self._audit(work, s)
        fact = super()._work(work, shared)
        if work.layers is not None and work.layers[1] < self.layers:
            return fact
        stand = fact.rows + max(0, len(fact.tokens) - 1)
        s.state[work.model] = done + stand
        for g in self.members(work):
            if s.count[g] >= 0:
                s.count[g] += stand
                s.state[f"kept{g}"] = [*self._kept(s, g), *range(done, done + stand)]
        if self.cut is not None and work.model == "target" and self.cut(s.prompt, work.start) == done + stand:
            return WorkResult(
                rows=fact.rows, tokens=fact.tokens, draft=fact.draft, parents=fact.parents,
                kept=self._forget_some(work, s, done + stand),
            )  # fmt: skip
        return fact

    def _audit(self, work: Work, s: Mirrored) -> None:
        """Every entry that the work could read is what its tokens say."""
        state, chain = self.origin(work.request), []
        for code in inputs(s.tokens[: work.start].tolist(), s.spans):
            state = step(state, code)
            chain.append(state)
        for g in self.members(work):
            at = self.mirror.entry(work, g)
            positions = self._kept(s, g) if s.count[g] >= 0 else range(s.first[g], work.start)
            window = self.groups[g].window
            for i in range(at):
                p = positions[len(positions) - at + i] if len(positions) >= at - i else None
                if p is None or (window is not None and p < work.start - window + 1):
                    continue
                if self.memory.get(self.place(work, g, i)) != chain[p]:
                    raise InvariantError(f"sequence {work.request}: entry {i} of group {g} is not position {p}'s")

    def _kept(self, s: Mirrored, g: int) -> list[int]:
        """Positions of a compressed table's entries; of an inherited one only those that came later are known."""
        return s.state.get(f"kept{g}", [])  # type: ignore[return-value]

    def _forget_some(self, work: Work, s: Mirrored, stop: int) -> dict[int, int]:
        """Keep some entries, the last one among them, packed at the table's head: what a real compression would do."""
        out = {}
        for g in self.members(work):
            if self.groups[g].window is not None:
                continue
            count = s.count[g] if s.count[g] >= 0 else stop
            if s.count[g] >= 0 and len(self._kept(s, g)) < count:
                continue  # an inherited table: its positions are not known here
            positions = self._kept(s, g) if s.count[g] >= 0 else list(range(count))
            keep = sorted({count - 1, *self.rnd.sample(range(count), self.rnd.randint(1, count))})
            values = [self.memory[self.place(work, g, i)] for i in keep]
            for i in range(count):
                self.memory[self.place(work, g, i)] = values[i] if i < len(keep) else self.rnd.getrandbits(60)
            s.count[g], s.state[f"kept{g}"] = len(keep), [positions[i] for i in keep]
            out[g] = len(keep)
        return out


class Going:
    """Stands for a draft by a second model: the executor of these tests guesses by itself."""

    model = "second"
    guesses = 3


@dataclass
class Wanted:
    """What a sequence should be.  kinds: for each position p (prompt), g (given by a program) or o (output)."""

    sampling: SamplingSpec
    seed: int
    origin: int
    codes: list[int]
    kinds: list[str]
    spans: tuple[Span, ...] = ()
    pure: bool = True
    """No program has touched it: its output is `null.reference`'s."""
    output: list[int] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    reason: str | None = None

    def state(self) -> int:
        state = self.origin
        for code in self.codes:
            state = step(state, code)
        return state

    def token(self) -> int:
        """The token that must come next."""
        return draw(self.state(), self.sampling, self.seed, len(self.output), VOCAB)

    def take(self, token: int, limit: int) -> str | None:
        """Put an output token in; returns why the sequence ends there, if it does."""
        self.output.append(token)
        self.codes.append(token)
        self.kinds.append("o")
        if token in self.sampling.stop_ids and len(self.output) > self.sampling.min_tokens:
            return "stop"
        over = len(self.output) >= self.sampling.max_tokens or len(self.codes) >= limit
        return "length" if over else None

    def copy(self, seed: int) -> Wanted:
        return Wanted(
            self.sampling, seed, self.origin, list(self.codes), list(self.kinds), self.spans, False, list(self.output),
            list(self.told),
        )  # fmt: skip


def tokens_of(items: Sequence[object]) -> list[int]:
    """Context ids of items: -1 where no token stands."""
    return [i for item in items for i in (item.ids if isinstance(item, TokenItem) else [-1] * item.rows)]  # type: ignore[attr-defined]


def sequences_of(spec: RequestSpec) -> list[Wanted]:
    at, spans = 0, []
    for item in spec.items:
        if not isinstance(item, TokenItem):
            spans.append(Span(at, at + item.rows, item.digest))
        at += item.rows
    codes = inputs(tokens_of(spec.items), spans)
    return [
        Wanted(
            spec.sampling, noise.child_seed(spec.seed, k), origin_of(spec.salt), list(codes), ["p"] * len(codes), tuple(spans)
        )
        for k in range(spec.n)
    ]  # fmt: skip


def run(
    engine: Engine, executor: Executor, specs: Sequence[RequestSpec], most: int = 5000
) -> dict[tuple[int, int], list[int]]:
    """Add everything, step until all is done, and give the outputs by (id, index)."""
    out: dict[tuple[int, int], list[int]] = {}
    for spec in specs:
        assert engine.add(spec, 0.0) == []
    for now in range(most):
        if not engine.has_work:
            return out
        for event in one_step(engine, executor, float(now)):
            if isinstance(event, Tokens):
                out.setdefault((event.id, event.index), []).extend(event.tokens)
            assert not isinstance(event, Finished) or event.reason != "error"
    raise AssertionError(f"not done after {most} steps: {engine.stats}")


def one_step(engine: Engine, executor: Executor, now: float) -> list[Event]:
    for r in engine.requests():
        executor.salts[r.rid] = r.spec.salt
    plan, events = engine.schedule(now)
    events = [*events, *engine.commit(now, plan, executor.execute(plan))]
    engine.check()
    return events
