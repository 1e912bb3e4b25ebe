"""The torch executor: carries out plans on real models.

A plan's works become one flattened batch (several where works pass different layers), the decoder gives logits for the rows that
sample, and the sampler turns those into tokens.  A second model follows once it is known what was accepted (`exec.ahead`).
Nothing here decides: what to compute is the plan's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from weft.config import Stacks, build_stack
from weft.core import switch
from weft.core.tiers import Exchange
from weft.errors import InvariantError
from weft.exec.ahead import Ahead, Reader
from weft.exec.batch import Batch
from weft.exec.beside import Beside
from weft.exec.compress import Compression
from weft.exec.gather import Gather, Wanted
from weft.exec.kvpool import KVPool
from weft.exec.leaving import EarlyExits, leaves_early
from weft.exec.mirror import Mirror
from weft.exec.pooled import Pooling
from weft.exec.reading import Reading
from weft.exec.shallow import Shallow
from weft.exec.steady import Steadiness, Steady
from weft.exec.tiers import TierStore
from weft.exec.verify import Probe, Sampling
from weft.models.decoder import Decoder
from weft.slots import Translation
from weft.types import GroupKind, KVOpKind, Plan, StepResult, Work, WorkResult

TARGET, DRAFT = "target", "draft"
"""Names of the model that answers and of the one that guesses for it."""


class TorchExecutor:
    """decoders: by model name, the target among them.  pool: the KV of all groups.  stacks: the server's, and its requests'.

    max_guesses: of one sequence that a plan would have verified (`Limits.max_guesses`); more are not asked for.
    exchange: where prompts are handed over.  Raises ConfigError where a tier below the pool cannot be opened.
    """

    def __init__(
        self, decoders: Mapping[str, Decoder], pool: KVPool, stacks: Stacks | None = None, *, max_guesses: int = 1 << 16,
        exchange: Exchange | None = None,
    ) -> None:  # fmt: skip
        self.decoders = dict(decoders)
        self.pool = pool
        self.groups = pool.groups
        self.stacks = stacks or Stacks(build_stack())
        self.mirror = Mirror(pool.groups, self.stacks)
        self.device = pool.device
        self._forward_s = 0.0
        self._members = {
            name: [g for g, spec in enumerate(pool.groups) if spec.model == name] for name in self.decoders
        }
        offload = exchange or self.stacks.base.get("kv.offload")
        self.tiers = None if offload is None else TierStore(offload, pool)
        self._reading = Reading(self.mirror, self.decoders[TARGET])
        self._gather = Gather(self.mirror, pool, self._members, self._reading.target)
        self._sampling = Sampling(
            self.mirror, pool, self._members, max_guesses, self._reading, self.decoders[TARGET].program
        )
        exits = getattr(self.stacks.base["draft"], "exits", None)
        if exits is not None:
            target = self.decoders[TARGET]
            found = exits(len(target.spec.layers))
            self._sampling.shallow = Shallow(TARGET, target, self._gather, pool, found, self._first_layers)
        self._pooling = Pooling(self.mirror, self.decoders[TARGET])
        between: Translation | None = getattr(self.stacks.base["draft"], "translation", None)
        vocab = self.decoders[TARGET].spec.vocab
        self._reader = None if between is None else Reader(between, vocab, self.device)
        self._compression = Compression(self.mirror, pool, self._members)
        alone = len(self.decoders) == 1 and exits is None
        self._steadiness = Steadiness(self.decoders[TARGET].program if alone else None)
        self._steady: Steady | None = None
        """Of the step in hand."""
        self._beside: Beside | None = None
        if DRAFT in self.decoders:
            self._beside = self._sampling.beside = Beside(
                self.mirror, DRAFT, self.decoders[DRAFT], self._gather, pool, max_guesses, self._reader
            )

    def close(self) -> None:
        """Give up what lies below the pool, and the draft's thread; twice does no harm."""
        if self._beside is not None:
            self._beside.close()
        if self.tiers is not None:
            self.tiers.close()

    def watch(self, probe: Probe | None) -> None:
        """Give every row that a token is taken from to `probe`, or to nobody."""
        self._sampling.probe = probe

    @torch.inference_mode()
    def execute(self, plan: Plan) -> StepResult:
        """Carry out a plan.  Tokens, never tensors, come back."""
        if self.tiers is not None:
            self.tiers.end()  # a plan that was broken off may have left something behind
        self.mirror.follow(plan)
        lost, void = self._instructions(plan)
        self._forward_s, self._steady = 0.0, None
        masks = self._sampling.masks
        masks.reset()
        self._reading.reset()
        if self._sampling.shallow is not None:
            self._sampling.shallow.reset()
        works = plan.works if not void else [w for i, w in enumerate(plan.works) if i not in void]
        mine = [i for i, w in enumerate(works) if w.model == TARGET]
        early: set[int] = set()
        try:
            early = self._beside.begin(works) if self._beside is not None else early
            found = self._forward(TARGET, works, mine) if mine else []
        finally:  # whatever became of the pass, nobody goes on while the other thread writes
            waited = self._waited()
        middle = time.perf_counter() - self._forward_s
        steady = None if self._steady is None else self._steady.results(works, found[0][0])
        results = self._sampled(works, found) if steady is None else steady
        lost += self._saved(plan, void)
        if self.tiers is not None:
            lost += [ticket for ticket, _ in self.tiers.end()]
        began = time.perf_counter()
        if steady is None:
            self._propose(works, results, early)
        ended = time.perf_counter()
        sample_s = ended - self._forward_s - middle
        if void:
            facts = iter(results)
            results = [WorkResult(rows=0) if i in void else next(facts) for i in range(len(plan.works))]
        return StepResult(
            step=plan.step, works=tuple(results),
            lost=tuple(lost), forward_s=self._forward_s, sample_s=sample_s, masked=masks.rows, mask_s=masks.seconds,
            draft_s=ended - began + waited, beside_s=0.0 if self._beside is None else self._beside.seconds,
        )  # fmt: skip

    def _sampled(self, works: Sequence[Work], found: list[tuple[Tensor, list[Wanted]]]) -> list[WorkResult]:
        """Facts of the works, from the logits of those that wanted some."""
        results = [WorkResult(rows=w.count - w.guesses) for w in works]
        for logits, wanted in found:
            self._sampling.sample(works, logits, wanted, results)
        self._compression.settle(works, results)
        self._pooling.settle(works, results)
        return results

    def _propose(self, works: Sequence[Work], results: list[WorkResult], early: set[int]) -> None:
        """Guesses for the next plan.  early: requests for which they were made beside the target's pass."""
        others = {w.request for w in works} - early if early else None
        ahead = {name: self._ahead(name, works, results, others) for name in self.decoders if name != TARGET}
        self._sampling.propose(works, results, ahead.get(DRAFT))
        for other in ahead.values():
            other.settle(results)
        if self._beside is not None:
            self._beside.settle(works, results)

    def _waited(self) -> float:
        """Wait for a draft that guesses beside the target; the seconds are of the step's `forward_s`, and of its `draft_s`."""
        if self._beside is None:
            return 0.0
        self._beside.end()
        self._forward_s += self._beside.waited
        return self._beside.waited

    def _ahead(
        self, name: str, works: Sequence[Work], results: Sequence[WorkResult], requests: set[int] | None
    ) -> Ahead:
        return Ahead(name, self.decoders[name], self._gather, self._timed, works, results, self._reader, requests)

    def _instructions(self, plan: Plan) -> tuple[list[int], set[int]]:
        """Carry out the plan's KV instructions: (tickets that were lost, works that would read what was not loaded)."""
        lost: list[tuple[int, int]] = []
        bad: set[int] = set()
        free = self._aside(plan)
        for i, op in enumerate(plan.kv):
            if i in free:
                continue
            if op.kind not in (KVOpKind.SAVE, KVOpKind.LOAD):
                self.pool.carry_out(op)
                continue
            if self.tiers is None:
                raise InvariantError(f"the plan has {op.kind}, and the stack has no kv.offload")
            here = self.tiers.carry_out(op)
            lost += here
            if op.kind is KVOpKind.LOAD:
                bad.update(block for _, block in here)
        if self.tiers is not None:
            for i in sorted(free):
                self.tiers.begin(plan.kv[i])
            self.tiers.fetch(plan.fetch)
        return [ticket for ticket, _ in lost], self.mirror.reading(plan.works, bad)

    def _aside(self, plan: Plan) -> frozenset[int]:
        """KV instructions that are carried out while the rows are computed, where there are threads for that."""
        if self.tiers is None or not self.tiers.beside or not plan.kv:
            return frozenset()
        loaded = {block for op in plan.kv if op.kind is KVOpKind.LOAD for block in op.target}
        return switch.aside(plan) if not self.mirror.reading(plan.works, loaded) else frozenset()

    def _saved(self, plan: Plan, void: set[int]) -> list[int]:
        """Save what the works have computed; tickets of what was lost, and of everything where a work was void."""
        if plan.after and self.tiers is None:
            raise InvariantError("the plan hands prompts over, and the engine shares no memory for that")
        if void:
            return [ticket for op in plan.after for ticket in op.argument]
        return [ticket for op in plan.after if self.tiers for ticket, _ in self.tiers.carry_out(op)]

    # ------------------------------------------------------------------ forward

    def _forward(self, name: str, works: Sequence[Work], mine: list[int]) -> list[tuple[Tensor, list[Wanted]]]:
        decoder = self.decoders[name]
        if all(works[i].layers is None for i in mine):
            batch, wanted = self._gather.step(name, works, mine)
            self._steady = self._steadiness.of(batch) if self._sampling.probe is None else None
            if self._steady is not None:
                began = time.perf_counter()
                logits = decoder.forward(batch, self.pool)
                self._passed(began)
                return [(logits, wanted)]
            self._compression.ask(batch, works, mine)
            logits = self._timed(decoder, batch)
            self._compression.take(batch)
            self._look(name, batch, works, mine)
            return [(logits, wanted)] if wanted else []
        return self._forward_split(name, decoder, works, mine)

    def _look(self, name: str, batch: Batch, works: Sequence[Work], mine: Sequence[int]) -> None:
        if name == TARGET:
            self._pooling.take(batch, works, mine)
            self._reading.take(batch, works, mine)

    def _timed(
        self, decoder: Decoder, batch: Batch, layers: tuple[int, int] | None = None, hidden: Tensor | None = None
    ) -> Tensor:
        """The decoder's pass, whose seconds are the step's `forward_s`; what builds batches is host time."""
        began, shallow = time.perf_counter(), self._sampling.shallow
        if leaves_early(batch):
            result = EarlyExits(decoder, self.pool).forward(batch, layers, hidden)
        elif layers is None and decoder is self.decoders[TARGET] and shallow is not None:
            result = shallow.watched(batch)
        else:
            result = decoder.forward(batch, self.pool, layers=layers, hidden=hidden)
        self._passed(began)
        return result

    def _passed(self, began: float) -> None:
        """A pass is at its end."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._forward_s += time.perf_counter() - began

    def _first_layers(self, batch: Batch, layers: int) -> Tensor:
        """Hidden states of rows ahead after the target's first layers."""
        began = time.perf_counter()
        result = self.decoders[TARGET].forward(batch, self.pool, layers=(0, layers))
        self._passed(began)
        return result

    def _forward_split(
        self, name: str, decoder: Decoder, works: Sequence[Work], mine: list[int]
    ) -> list[tuple[Tensor, list[Wanted]]]:
        """Works that pass different layers: the layers are cut where any work begins or ends."""
        depth = len(decoder.spec.layers)
        spans = {i: works[i].layers or (0, depth) for i in mine}
        edges = sorted({edge for span in spans.values() for edge in span})
        hidden: dict[int, Tensor] = {i: self._parked(name, works[i]) for i in mine if spans[i][0] > 0}
        out: list[tuple[Tensor, list[Wanted]]] = []
        for low, high in itertools.pairwise(edges):
            active = [i for i in mine if spans[i][0] <= low and high <= spans[i][1]]
            if not active:
                continue
            batch, wanted = self._gather.batch(name, works, active)
            self._compression.ask(batch, works, active)
            entering = torch.cat([hidden[i] for i in active]) if low > 0 else None
            result = self._timed(decoder, batch, (low, high), entering)
            self._compression.take(batch)
            if high == depth:
                self._look(name, batch, works, active)
                if wanted:
                    out.append((result, wanted))
                continue
            # The result is a view of the decoder's workspace, which the next stretch overwrites.
            parts = result.clone().split([works[i].passing for i in active])
            hidden.update(zip(active, parts, strict=True))
        for i in mine:
            if spans[i][1] < depth:
                self._park(name, works[i], hidden[i])
        return out

    def _park(self, name: str, work: Work, hidden: Tensor) -> None:
        g, slots = self._park_slots(name, work)
        self.pool.park(g, slots, hidden)

    def _parked(self, name: str, work: Work) -> Tensor:
        g, slots = self._park_slots(name, work)
        return self.pool.unpark(g, slots).to(self.decoders[name].stream_dtype)

    def _park_slots(self, name: str, work: Work) -> tuple[int, Tensor]:
        g = next((g for g in self._members[name] if self.groups[g].kind is GroupKind.PARKED), None)
        if g is None:
            raise InvariantError(f"model {name} has no group for parked hidden states")
        table, size = self.mirror.sequences[work.request].table(g), self.groups[g].block_tokens
        entries = np.arange(len(work.tokens))
        return g, torch.from_numpy(table[entries // size] * size + entries % size).to(self.device)
