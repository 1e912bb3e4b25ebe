"""An executor without a model: every entry of KV is the hash of the one before it and its token.

It moves no tensors, but it is as strict as one that does: it reads and writes only through the block tables that the plans grant,
so a token is right only if every block, copy and prefix hit on its way was.  `reference` computes the same tokens without
any table; tests compare the two.  Used where decisions matter and answers do not: state machines, schedulers, load tests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from weft.core import noise
from weft.errors import InvariantError
from weft.exec.mirror import Mirror
from weft.types import GroupKind, GroupSpec, KVOp, KVOpKind, Mask, Plan, SamplingSpec, StepResult, Work, WorkResult

EMPTY = 0


def step(state: int, token: int) -> int:
    """KV of a position from the KV of the one before it and its token."""
    data = state.to_bytes(8, "little") + (token + 1).to_bytes(8, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def draw(state: int, sampling: SamplingSpec, seed: int, output: int, vocab: int) -> int:
    """The token that follows: of the state alone when greedy, of the state and the request's noise otherwise."""
    key = noise.row_key(seed, output) if sampling.temperature else 0
    return noise.mix(state ^ key) % vocab


def reference(prompt: Sequence[int], sampling: SamplingSpec, seed: int, vocab: int, limit: int = 1 << 62) -> list[int]:
    """The output of one sequence, computed without an engine."""
    state = EMPTY
    for token in prompt:
        state = step(state, token)
    out: list[int] = []
    while True:
        token = draw(state, sampling, seed, len(out), vocab)
        out.append(token)
        ended = token in sampling.stop_ids and len(out) > sampling.min_tokens
        if ended or len(out) >= sampling.max_tokens or len(prompt) + len(out) >= limit:
            return out
        state = step(state, token)


class NullExecutor:
    """groups as the engine's.  layers: of the target.  Subclass hooks `rows` and `propose` make short results and drafts."""

    def __init__(self, groups: Sequence[GroupSpec], *, vocab: int = 256, layers: int = 1) -> None:
        self.mirror = Mirror(groups)
        self.groups = list(groups)
        self.vocab = vocab
        self.layers = layers
        self.entries: dict[tuple[int, int], int] = {}
        """(group, slot) -> KV, as the pool's memory; blocks of one id serve any group."""
        self.parked: dict[int, list[int]] = {}

    def execute(self, plan: Plan) -> StepResult:
        self.mirror.follow(plan)
        for op in plan.kv:
            self._carry_out(op)
        written = self._exclusive(plan)
        results = []
        for work in plan.works:
            results.append(self._work(work))
        del written
        return StepResult(step=plan.step, works=tuple(results))

    # ------------------------------------------------------------------ hooks for tests

    def rows(self, work: Work) -> int:
        """Rows to compute of a work, at most planned."""
        return work.count - work.guesses

    def propose(self, work: Work, context: list[int]) -> tuple[int, ...]:
        """Guesses for the next plan."""
        return ()

    # ------------------------------------------------------------------ inside

    def _carry_out(self, op: KVOp) -> None:
        if op.kind is not KVOpKind.COPY:
            raise InvariantError(f"the null executor has no {op.kind}")
        for source, target in zip(op.source, op.target, strict=True):
            for g, spec in enumerate(self.groups):
                for i in range(spec.block_tokens):
                    value = self.entries.get((g, source * spec.block_tokens + i))
                    if value is not None:
                        self.entries[g, target * spec.block_tokens + i] = value

    def _exclusive(self, plan: Plan) -> dict[int, int]:
        """No block is written by two sequences, or written by one and read by another, in one plan."""
        writer: dict[int, int] = {}
        for work in plan.works:
            for g in self._groups(work):
                for slot in self.mirror.slots(work, g):
                    block = int(slot) // self.groups[g].block_tokens
                    if writer.setdefault(block, work.request) != work.request:
                        raise InvariantError(f"block {block} is written by two sequences in step {plan.step}")
        for work in plan.works:
            s = self.mirror.sequences[work.request]
            for g in self._groups(work):
                for block in s.table(g):
                    if writer.get(int(block), work.request) != work.request:
                        raise InvariantError(
                            f"block {block} is read while another sequence writes it in step {plan.step}"
                        )
        return writer

    def _groups(self, work: Work) -> list[int]:
        return [g for g, s in enumerate(self.groups) if s.model == work.model and s.kind is not GroupKind.PARKED]

    def _before(self, work: Work, g: int) -> int:
        """KV of the position before the work's first."""
        if work.start == 0:
            return EMPTY
        s, bt = self.mirror.sequences[work.request], self.groups[g].block_tokens
        at = self.mirror.entry(work, g) - 1
        if at < 0:
            raise InvariantError(f"sequence {work.request}: position {work.start - 1} is not in group {g} any more")
        return self.entries[g, int(s.tables[g][at // bt]) * bt + at % bt]

    def _work(self, work: Work) -> WorkResult:
        if work.mask is Mask.TREE:
            raise InvariantError("the null executor takes no trees")
        count = self.rows(work)
        if work.layers is not None and work.layers[1] < self.layers:
            return WorkResult(rows=count)
        full = count == work.count - work.guesses
        tokens = work.tokens if full else work.tokens[:count]
        states: list[int] = []
        for n, g in enumerate(self._groups(work)):
            state = self._before(work, g)
            here = []
            for token, slot in zip(tokens, self.mirror.slots(work, g), strict=False):
                state = step(state, token)
                here.append(state)
                self.entries[g, int(slot)] = state
            if n and here != states:
                raise InvariantError(f"sequence {work.request}: its groups tell different histories at {work.start}")
            states = here
        if not (work.samples and full):
            return WorkResult(rows=count)
        return self._sample(work, states, count)

    def _sample(self, work: Work, states: list[int], count: int) -> WorkResult:
        s = self.mirror.sequences[work.request]
        out: list[int] = []
        for i in range(work.guesses + 1):
            token = draw(states[count - 1 + i], s.sampling, s.seed, work.output + len(out), self.vocab)
            out.append(token)
            if i == work.guesses or token != work.tokens[count + i]:
                break
        context = [*s.tokens[: work.start + count].tolist(), *out]
        return WorkResult(rows=count, tokens=tuple(out), draft=self.propose(work, context))
