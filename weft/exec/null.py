"""An executor without a model: every entry of KV is the hash of the one before it and its input.

It moves no tensors, but it is as strict as one that does: it reads and writes only through the block tables that the plans grant,
so a token is right only if every block, copy and prefix hit on its way was.  `reference` computes the same tokens without
any table; tests compare the two.  Used where decisions matter and answers do not: state machines, schedulers, load tests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from weft.config import Stacks
from weft.core import noise
from weft.errors import InvariantError
from weft.exec.mirror import Mirror
from weft.slots import Guesses, candidates
from weft.types import (
    GroupKind,
    GroupSpec,
    KVOp,
    KVOpKind,
    Plan,
    SamplingSpec,
    Span,
    StepResult,
    TokenLogprob,
    Work,
    WorkResult,
)

EMPTY = 0
"""State before the first position."""


def step(state: int, code: int) -> int:
    """KV of a position from the KV of the one before it and its input."""
    data = state.to_bytes(8, "little") + code.to_bytes(8, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def inputs(tokens: Sequence[int], spans: Sequence[Span], start: int = 0) -> list[int]:
    """What stands at positions start, start + 1, ...: the id, or a negative code of the item and the row in it."""
    codes = list(tokens)
    for span in spans:
        for at in range(max(span.start, start), min(span.stop, start + len(codes))):
            if codes[at - start] < 0:
                data = span.digest + (at - span.start).to_bytes(8, "little")
                codes[at - start] = -1 - int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little")
    return codes


def draw(state: int, sampling: SamplingSpec, seed: int, output: int, vocab: int) -> int:
    """The token that follows: of the state alone when greedy, of the state and the request's noise otherwise."""
    key = noise.row_key(seed, output) if sampling.temperature else 0
    return noise.mix(state ^ key) % vocab


def logprob(state: int, token: int, top: int, vocab: int) -> TokenLogprob:
    """Log-probabilities that mean nothing and are the state's own: no two of them are equal, and they fall with the rank."""
    order = sorted(range(vocab), key=lambda t: noise.mix(state ^ (t + 1)))
    told = [(t, -0.1 * (rank + 1) - noise.mix(state ^ (t + 1)) / noise.MASK / 100) for rank, t in enumerate(order)]
    rank = order.index(token)
    return TokenLogprob(token, told[rank][1], rank + 1, tuple(told[:top]))


def reference(
    prompt: Sequence[int],
    sampling: SamplingSpec,
    seed: int,
    vocab: int,
    limit: int = 1 << 62,
    *,
    spans: Sequence[Span] = (),
    origin: int = EMPTY,
) -> list[int]:
    """The output of one sequence, computed without an engine.  limit: positions of the context."""
    state = origin
    for code in inputs(prompt, spans):
        state = step(state, code)
    out: list[int] = []
    while True:
        token = draw(state, sampling, seed, len(out), vocab)
        out.append(token)
        ended = token in sampling.stop_ids and len(out) > sampling.min_tokens
        if ended or len(out) >= sampling.max_tokens or len(prompt) + len(out) >= limit:
            return out
        state = step(state, token)


class NullExecutor:
    """groups, stacks as the engine's.  layers: of the target.  `origin`, `rows`, `further` and `propose` may be overridden.

    Of a stack that compresses it takes the pure half, cuts and budget: at a cut the newest entries stay, as many as it allows.
    """

    def __init__(
        self, groups: Sequence[GroupSpec], *, vocab: int = 256, layers: int = 1, stacks: Stacks | None = None
    ) -> None:
        self.mirror = Mirror(groups, stacks)
        self.groups = list(groups)
        self.vocab = vocab
        self.layers = layers
        self.memory: dict[tuple[int, int], int] = {}
        """(block, offset) -> what was written there last, by whichever group had the block."""
        self.records = 0
        """Records below the pool, 0 for as many as there are tickets.  A record holds what was saved in it last."""
        self.stored: dict[int, tuple[int, dict[int, int]]] = {}
        """By record: its ticket, and what the block held by offset."""

    def execute(self, plan: Plan) -> StepResult:
        self.mirror.follow(plan)
        lost, bad = list[int](), set[int]()
        for op in plan.kv:
            for ticket, block in self._carry_out(op):
                lost.append(ticket)
                bad.update(block)
        self._exclusive(plan)
        shared: dict[int, int] = {}
        void = self.mirror.reading(plan.works, bad)
        works = [work for i, work in enumerate(plan.works) if i not in void]
        facts = [
            None if work.ahead and work.model != "target" else self._compress(work, self._work(work, shared))
            for work in works
        ]
        told = {w.request: f.tokens for w, f in zip(works, facts, strict=True) if f is not None and w.samples}
        done = iter([
            self._go_ahead(work, told.get(work.request, ())) if fact is None else fact
            for work, fact in zip(works, facts, strict=True)
        ])  # fmt: skip
        results = tuple(WorkResult(rows=0) if i in void else next(done) for i in range(len(plan.works)))
        return StepResult(step=plan.step, works=results, lost=tuple(lost))

    def close(self) -> None:
        """Nothing to give up."""

    # ------------------------------------------------------------------ to be overridden

    def origin(self, request: int) -> int:
        """State before the first position of a request."""
        return EMPTY

    def rows(self, work: Work) -> int:
        """Rows to compute of a work, at most its context rows."""
        return work.count - work.guesses

    def further(self, work: Work, tokens: Sequence[int]) -> Sequence[int]:
        """How many of the tokens that stand after a work's rows are computed with them, where it may go ahead."""
        return tokens[: work.ahead]

    def propose(self, work: Work, state: int, output: int) -> Guesses:
        """Guesses for the next plan.  state: after the newest token.  output: its index plus one."""
        return Guesses(())

    def loses(self, ticket: int) -> bool:
        """Whether saving or loading under this ticket goes wrong."""
        return False

    # ------------------------------------------------------------------ memory

    def place(self, work: Work, g: int, entry: int) -> tuple[int, int]:
        """(block, offset) of an entry of the work's table in group g."""
        block, offset = divmod(entry, self.groups[g].block_tokens)
        return int(self.mirror.sequences[work.request].table(g)[block]), offset

    def members(self, work: Work) -> list[int]:
        """The groups of the work's model that hold its KV."""
        return [g for g, s in enumerate(self.groups) if s.model == work.model and s.kind is not GroupKind.PARKED]

    def _carry_out(self, op: KVOp) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Carry out COPY, SAVE and LOAD; gives what was lost: (ticket, blocks that were not loaded)."""
        size = range(self.groups[op.group].block_tokens)
        if op.kind is KVOpKind.COPY:
            for source, target in zip(op.source, op.target, strict=True):
                self._fill(target, {i: self.memory[source, i] for i in size if (source, i) in self.memory})
        elif op.kind is KVOpKind.SAVE:
            for source, ticket in zip(op.source, op.argument, strict=True):
                if self.loses(ticket):
                    yield ticket, ()
                else:
                    held = {i: self.memory[source, i] for i in size if (source, i) in self.memory}
                    self.stored[ticket % (self.records or ticket + 1)] = ticket, held
        elif op.kind is KVOpKind.LOAD:
            for target, ticket in zip(op.target, op.argument, strict=True):
                known, held = self.stored.get(ticket % (self.records or ticket + 1), (-1, {}))
                if known != ticket or self.loses(ticket):
                    yield ticket, (target,)
                else:
                    self._fill(target, held)
        else:
            raise InvariantError(f"the null executor has no {op.kind}")

    def _fill(self, block: int, entries: Mapping[int, int]) -> None:
        for offset, state in entries.items():
            self.memory[block, offset] = state

    def _exclusive(self, plan: Plan) -> None:
        """No block is written by two sequences, or written by one and read by another, in one plan."""
        writer: dict[int, int] = {}
        for work in plan.works:
            for g in self.members(work):
                size = self.groups[g].block_tokens
                for block in {int(slot) // size for slot in self.mirror.slots(work, g, work.ahead)}:
                    if writer.setdefault(block, work.request) != work.request:
                        raise InvariantError(f"block {block} is written by two sequences in step {plan.step}")
        for work in plan.works:
            s = self.mirror.sequences[work.request]
            for g in self.members(work):
                for block in s.table(g):
                    if writer.get(int(block), work.request) != work.request:
                        raise InvariantError(
                            f"block {block} is read while another sequence writes it in step {plan.step}"
                        )

    # ------------------------------------------------------------------ works

    def _work(self, work: Work, shared: dict[int, int]) -> WorkResult:
        count, planned = self.rows(work), work.count - work.guesses
        tokens = work.tokens if count == planned else work.tokens[:count]
        states = self._states(work, tokens)
        first, last = work.layers or (0, self.layers)
        for g in self.members(work):
            at = self.mirror.entry(work, g)
            for i, state in enumerate(states):
                place = self.place(work, g, at + i)
                if first and self.memory.get(place) != state:
                    raise InvariantError(f"sequence {work.request}: KV of layers below {first} is gone at row {i}")
                self.memory[place] = state
        if work.layers is not None:
            self._through(work, states, first, last)
        if last < self.layers or not work.samples or count < planned:
            return WorkResult(rows=count)
        return self._sample(work, states, count, shared)

    def _compress(self, work: Work, fact: WorkResult) -> WorkResult:
        """Count the entries of a compressed sequence on, and drop some where its stack cuts."""
        s = self.mirror.sequences[work.request]
        ends = work.layers is None or work.layers[1] == self.layers
        if s.stack.get("kv.compress") is None or work.model != "target" or not ends or fact.failed is not None:
            return fact
        full = [g for g in self.members(work) if self.groups[g].window is None]
        stand = fact.rows + max(0, len(fact.tokens) - 1)
        stop, kept = work.start + stand, dict[int, int]()
        for g in full:
            if s.count[g] >= 0:
                s.count[g] += stand
        if s.stack.cut(s.prompt, work.start) != stop:
            return fact
        following = s.stack.cut(s.prompt, stop)
        most = s.stack.budget(s.prompt, 1 << 62) - (0 if following is None else following - stop)
        for g in full:
            entries = s.count[g] if s.count[g] >= 0 else stop
            kept[g] = stay = min(entries, most)
            for i in range(stay):
                self.memory[self.place(work, g, i)] = self.memory[self.place(work, g, entries - stay + i)]
            if stay < entries:
                s.count[g] = stay
        return msgspec.structs.replace(fact, kept=kept)

    def _go_ahead(self, work: Work, tokens: Sequence[int]) -> WorkResult:
        """The rows of a work that may go ahead, and then of the tokens that came after them."""
        fact = self._work(work, {})
        more = tuple(self.further(work, tokens)) if fact.failed is None and fact.rows == len(work.tokens) else ()
        if not more:
            return fact
        beyond = msgspec.structs.replace(work, rows=((work.stop, work.stop + len(more)),), tokens=more, ahead=0)
        rest = self._work(beyond, {})
        return rest if rest.failed is not None else WorkResult(rows=fact.rows + rest.rows)

    def _states(self, work: Work, tokens: Sequence[int]) -> list[int]:
        """KV of the work's rows, from what its tables hold; all groups of a model must tell the same."""
        found: list[int] = []
        for g in self.members(work):
            at = self.mirror.entry(work, g)
            if work.start and not at:
                raise InvariantError(f"sequence {work.request}: position {work.start - 1} is not in group {g} any more")
            found.append(self.memory.get(self.place(work, g, at - 1), EMPTY) if at else self.origin(work.request))
        if len(set(found)) > 1:
            raise InvariantError(f"sequence {work.request}: its groups tell different histories at {work.start}")
        states, context = list[int](), work.count - work.guesses
        for i, code in enumerate(inputs(tokens, self.mirror.sequences[work.request].spans, work.start)):
            before = context + work.parents[i - context] if work.parents and i >= context else i - 1
            states.append(step(states[before] if before >= 0 else found[0], code))
        return states

    def _through(self, work: Work, states: list[int], first: int, last: int) -> None:
        """Rows that stop between layers leave a hidden state behind, and must find it again."""
        g = next(g for g, s in enumerate(self.groups) if s.model == work.model and s.kind is GroupKind.PARKED)
        for i, state in enumerate(states):
            place = self.place(work, g, i)
            if first and self.memory.get(place) != noise.mix(state + first):
                raise InvariantError(
                    f"sequence {work.request}: the hidden state of row {i} after layer {first} is gone"
                )
            self.memory[place] = noise.mix(state + last)

    def _sample(self, work: Work, states: list[int], count: int, shared: dict[int, int]) -> WorkResult:
        s = self.mirror.sequences[work.request]
        out, path, parents = list[int](), [-1], work.parents or range(-1, work.guesses - 1)
        while True:
            token = draw(states[count + path[-1]], s.sampling, s.seed, work.output + len(out), self.vocab)
            if work.link is not None:
                token = shared.setdefault(work.link, token)
            out.append(token)
            hit = next((j for j in candidates(parents, path[-1:]) if work.tokens[count + j] == token), None)
            if hit is None:
                break
            path.append(hit)
        self._compact(work, count, path[1:])
        state = step(states[count + path[-1]], out[-1])
        told: tuple[TokenLogprob, ...] = ()
        if s.sampling.logprobs >= 0:
            told = tuple(
                logprob(states[count + j], t, s.sampling.logprobs, self.vocab) for j, t in zip(path, out, strict=True)
            )
        guesses = self.propose(work, state, work.output + len(out))
        s.write(work.start + count, out)
        return WorkResult(
            rows=count, tokens=tuple(out), draft=tuple(guesses.tokens), parents=tuple(guesses.parents), logprobs=told
        )

    def _compact(self, work: Work, count: int, path: list[int]) -> None:
        """Bring the entries of accepted guesses together, right after the context's."""
        for g in self.members(work):
            first = self.mirror.entry(work, g) + count
            held = [self.memory[self.place(work, g, first + j)] for j in path]
            for i, state in enumerate(held):
                self.memory[self.place(work, g, first + i)] = state
