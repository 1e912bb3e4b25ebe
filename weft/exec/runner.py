"""The torch executor: carries out plans on real models.

A plan's works become one flattened batch for each model (several where works pass different layers), the decoder gives logits for
the rows that sample, and the sampler turns those into tokens.  Nothing here decides: what to compute is the plan's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weft.errors import InvariantError
from weft.exec import sampler
from weft.exec.batch import Batch, GroupBatch
from weft.exec.kvpool import KVPool
from weft.exec.mirror import Ints, Mirror, Mirrored
from weft.models.decoder import Decoder
from weft.slots import Draft
from weft.types import GroupKind, KVOp, KVOpKind, Plan, StepResult, TokenLogprob, Work, WorkResult


@dataclass(slots=True)
class Wanted:
    """Which rows of a batch's logits belong to a work: prompt rows first, then the sampled ones."""

    work: int
    first: int
    prompt_rows: int
    sampled: int


class TorchExecutor:
    """decoders: by model name.  pool: the KV of all groups.  draft: the technique in that slot, or None."""

    def __init__(self, decoders: Mapping[str, Decoder], pool: KVPool, *, draft: Draft | None = None) -> None:
        self.decoders = dict(decoders)
        self.pool = pool
        self.groups = pool.groups
        self.mirror = Mirror(pool.groups)
        self.device = pool.device
        self.draft = draft
        self._forward_s = 0.0
        self._members = {
            name: [g for g, spec in enumerate(pool.groups) if spec.model == name] for name in self.decoders
        }

    @torch.inference_mode()
    def execute(self, plan: Plan) -> StepResult:
        """Carry out a plan.  Tokens, never tensors, come back."""
        self.mirror.follow(plan)
        for op in plan.kv:
            self.pool.carry_out(op)
        self._forward_s = 0.0
        found: list[tuple[Tensor, list[Wanted]]] = []
        for name in self.decoders:
            mine = [i for i, w in enumerate(plan.works) if w.model == name]
            if mine:
                found.extend(self._forward(name, plan.works, mine))
        middle = time.perf_counter()
        results = [WorkResult(rows=w.count - w.guesses) for w in plan.works]
        for logits, wanted in found:
            self._sample(plan.works, logits, wanted, results)
        ended = time.perf_counter()
        return StepResult(step=plan.step, works=tuple(results), forward_s=self._forward_s, sample_s=ended - middle)

    # ------------------------------------------------------------------ forward

    def _forward(self, name: str, works: Sequence[Work], mine: list[int]) -> list[tuple[Tensor, list[Wanted]]]:
        decoder = self.decoders[name]
        if all(works[i].layers is None for i in mine):
            batch, wanted = self.batch(name, works, mine)
            logits = self._timed(decoder, batch)
            return [(logits, wanted)] if wanted else []
        return self._forward_split(name, decoder, works, mine)

    def _timed(
        self, decoder: Decoder, batch: Batch, layers: tuple[int, int] | None = None, hidden: Tensor | None = None
    ) -> Tensor:
        """The decoder's pass, whose seconds are the step's `forward_s`; what builds batches is host time."""
        began = time.perf_counter()
        result = decoder.forward(batch, self.pool, layers=layers, hidden=hidden)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._forward_s += time.perf_counter() - began
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
            batch, wanted = self.batch(name, works, active)
            entering = torch.cat([hidden[i] for i in active]) if low > 0 else None
            result = self._timed(decoder, batch, (low, high), entering)
            if high == depth:
                if wanted:
                    out.append((result, wanted))
                continue
            # The result is a view of the decoder's workspace, which the next stretch overwrites.
            parts = result.clone().split([len(works[i].tokens) for i in active])
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
        return self.pool.unpark(g, slots).to(self.decoders[name].dtype)

    def _park_slots(self, name: str, work: Work) -> tuple[int, Tensor]:
        g = next((g for g in self._members[name] if self.groups[g].kind is GroupKind.PARKED), None)
        if g is None:
            raise InvariantError(f"model {name} has no group for parked hidden states")
        table, size = self.mirror.sequences[work.request].table(g), self.groups[g].block_tokens
        entries = np.arange(len(work.tokens))
        return g, torch.from_numpy(table[entries // size] * size + entries % size).to(self.device)

    def batch(self, name: str, works: Sequence[Work], mine: Sequence[int]) -> tuple[Batch, list[Wanted]]:
        """The works' rows, flattened in their order, and where the logits of each will stand."""
        bounds, positions = [0], list[Ints]()
        logit_rows: list[Ints] = []
        wanted: list[Wanted] = []
        trees: dict[int, tuple[int, ...]] = {}
        vectors: list[tuple[int, Tensor]] = []
        at = taken = 0
        for s, i in enumerate(mine):
            work = works[i]
            count = len(work.tokens)
            context = count - work.guesses
            positions.append(self._positions(work, context))
            if work.parents:
                trees[s] = tuple(context - 1 if p < 0 else context + p for p in work.parents)
            if -1 in work.tokens:
                vectors.extend(self._vectors(work, at))
            sampled = 1 + work.guesses if work.samples else 0
            if sampled or work.prompt_rows:
                wanted.append(Wanted(i, taken, work.prompt_rows, sampled))
                rows = range(at, at + work.prompt_rows), range(at + count - sampled, at + count)
                logit_rows.extend(np.arange(r.start, r.stop) for r in rows)
                taken += work.prompt_rows + sampled
            at += count
            bounds.append(at)
        tokens = np.fromiter((t for i in mine for t in works[i].tokens), np.int64, at)
        members = self._members[name]
        batch = Batch(
            tokens_T=self._tensor(tokens),
            positions_T=self._tensor(np.concatenate(positions)),
            bounds=bounds,
            groups=[self._group(g, works, mine) for g in members if self.groups[g].kind is not GroupKind.PARKED],
            logit_rows_N=self._tensor(np.concatenate(logit_rows) if logit_rows else np.empty(0, np.int64)),
            trees=trees,
            vectors=self._vector_rows(vectors),
        )
        return batch, wanted

    def _positions(self, work: Work, context: int) -> Ints:
        if not work.parents:
            return np.arange(work.start, work.start + len(work.tokens))
        depth: list[int] = []
        for p in work.parents:
            depth.append(0 if p < 0 else depth[p] + 1)
        return np.concatenate([np.arange(work.start, work.start + context), work.start + context + np.array(depth)])

    def _group(self, g: int, works: Sequence[Work], mine: Sequence[int]) -> GroupBatch:
        sequences = [self.mirror.sequences[works[i].request] for i in mine]
        tables = np.zeros((len(mine), max(s.used[g] for s in sequences)), np.int64)
        lengths = np.empty(len(mine), np.int64)
        slots = []
        for row, (i, s) in enumerate(zip(mine, sequences, strict=True)):
            tables[row, : s.used[g]] = s.table(g)
            lengths[row] = self.mirror.entry(works[i], g) + len(works[i].tokens)
            slots.append(self.mirror.slots(works[i], g))
        slots_T = self._tensor(np.concatenate(slots))
        first = np.array([s.first[g] for s in sequences], np.int64)
        return GroupBatch(self._tensor(tables), self._tensor(first), self._tensor(lengths), slots_T)

    def _vectors(self, work: Work, at: int) -> list[tuple[int, Tensor]]:
        """(batch row, vector) of each row whose input is a vector."""
        s = self.mirror.sequences[work.request]
        out = []
        for start, item in s.vectors.items():
            low, high = max(start, work.start), min(start + item.rows, work.start + len(work.tokens))
            if low < high:
                values = np.frombuffer(item.data, "<f4").reshape(item.rows, item.width)[low - start : high - start]
                out.append((at + low - work.start, torch.from_numpy(values.copy())))
        return out

    def _vector_rows(self, found: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor] | None:
        if not found:
            return None
        rows = torch.cat([torch.arange(at, at + len(v)) for at, v in found])
        return rows.to(self.device), torch.cat([v for _, v in found]).to(self.device)

    def _tensor(self, array: Ints) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)

    # ------------------------------------------------------------------ sample

    def _sample(
        self, works: Sequence[Work], logits_NV: Tensor, wanted: list[Wanted], results: list[WorkResult]
    ) -> None:
        rows: list[sampler.Row] = []
        index: list[int] = []
        for w in wanted:
            rows.extend(self._rows(works[w.work], w.sampled))
            index.extend(range(w.first + w.prompt_rows, w.first + w.prompt_rows + w.sampled))
        sampled_NV = (
            logits_NV
            if len(index) == len(logits_NV)
            else logits_NV[torch.tensor(index, dtype=torch.int64, device=logits_NV.device)]
        )
        finite = torch.isfinite(sampled_NV.amax(-1)).tolist() if index else []
        winners = sampler.draw(sampled_NV, rows) if index else []
        linked: dict[int, int] = {}
        at = 0
        for w in wanted:
            work = works[w.work]
            mine, fine = winners[at : at + w.sampled], all(finite[at : at + w.sampled])
            at += w.sampled
            if not fine:
                text = "the model gave a logit that is not a finite number; the checkpoint or its dtype is at fault"
                results[w.work] = WorkResult(rows=results[w.work].rows, failed=text)
                continue
            if work.link is not None and mine:
                # Linked rows share one draw: the first one's (the null of the slot `sample`).
                mine = [linked.setdefault(work.link, mine[0])]
            results[w.work] = self._result(work, w, mine, logits_NV)

    def _rows(self, work: Work, sampled: int) -> list[sampler.Row]:
        s: Mirrored = self.mirror.sequences[work.request]
        base = work.start + len(work.tokens) - sampled + 1
        out = []
        for i in range(sampled):
            history = s.tokens[: base + i]
            if work.parents and i:
                history = self._branch(work, i - 1, s)
            depth = len(history) - base
            out.append(sampler.Row(s.sampling, s.seed, work.output + depth, history, s.prompt))
        return out

    def _branch(self, work: Work, guess: int, s: Mirrored) -> Ints:
        """History of a guess in a tree: the context, its ancestors and itself."""
        path = []
        at = guess
        while at >= 0:
            path.append(work.tokens[len(work.tokens) - work.guesses + at])
            at = work.parents[at]
        base = work.start + len(work.tokens) - work.guesses
        return np.concatenate([s.tokens[:base], np.array(path[::-1], np.int64)])

    def _result(self, work: Work, w: Wanted, winners: list[int], logits_NV: Tensor) -> WorkResult:
        s = self.mirror.sequences[work.request]
        context = len(work.tokens) - work.guesses
        told: list[TokenLogprob] = []
        for i in range(w.prompt_rows):
            token = int(s.tokens[work.start + i + 1])
            told.append(sampler.logprobs(logits_NV[w.first + i], max(token, 0), s.sampling.prompt_logprobs))
        if not winners:
            return WorkResult(rows=context, prompt_logprobs=tuple(told))
        tokens, path = sampler.accept(work.tokens[context:], winners, work.parents)
        if path != list(range(len(path))):
            self._compact(work, context, path)
        chosen: list[TokenLogprob] = []
        if s.sampling.logprobs >= 0:
            first = w.first + w.prompt_rows
            at = [0, *(1 + j for j in path)]
            chosen = [
                sampler.logprobs(logits_NV[first + i], t, s.sampling.logprobs) for i, t in zip(at, tokens, strict=True)
            ]
        draft: tuple[int, ...] = ()
        if self.draft is not None and work.model == "target":
            if work.guesses:
                self.draft.observe(work.guesses, len(path))
            known = np.concatenate([s.tokens[: work.start + context], np.array(tokens, np.int64)])
            draft = tuple(self.draft.propose(known))
        return WorkResult(
            rows=context, tokens=tuple(tokens), draft=draft, logprobs=tuple(chosen), prompt_logprobs=tuple(told)
        )

    def _compact(self, work: Work, context: int, path: list[int]) -> None:
        """Bring the entries of an accepted branch together, right after the context's."""
        s = self.mirror.sequences[work.request]
        for g in self._members[work.model]:
            if self.groups[g].kind is GroupKind.PARKED:
                continue
            size = self.groups[g].block_tokens
            base = self.mirror.entry(work, g) + context
            table = tuple(int(b) for b in s.table(g)[base // size :])
            keep = (*range(base % size), *(base % size + j for j in path))
            self.pool.carry_out(KVOp(KVOpKind.COMPACT, g, table, table, keep))
