"""From a plan's works to a batch: rows flattened in their order, tables, slots, vectors, and whose logits are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weft.exec.batch import Batch, GroupBatch
from weft.exec.deltas import Deltas
from weft.exec.kvpool import KVPool
from weft.exec.mirror import Ints, Mirror
from weft.types import GroupKind, Work


@dataclass(slots=True)
class Wanted:
    """Which rows of a batch's logits belong to a work: prompt rows first, then the sampled ones."""

    work: int
    first: int
    prompt_rows: int
    sampled: int


class Gather:
    """Builds batches from what the mirror knows.  members: the pool's groups of each model."""

    def __init__(self, mirror: Mirror, pool: KVPool, members: dict[str, list[int]]) -> None:
        self.mirror, self.groups, self.device = mirror, pool.groups, pool.device
        self._members = members

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
                first = count - len(work.parents)
                trees[s] = tuple(first - 1 if p < 0 else first + p for p in work.parents)
            if -1 in work.tokens:
                vectors.extend(self._vectors(work, at))
            sampled = min(count, 1 + work.guesses) if work.samples else 0
            if sampled or work.prompt_rows:
                wanted.append(Wanted(i, taken, work.prompt_rows, sampled))
                rows = range(at, at + work.prompt_rows), range(at + count - sampled, at + count)
                logit_rows.extend(np.arange(r.start, r.stop) for r in rows)
                taken += work.prompt_rows + sampled
            at += count
            bounds.append(at)
        tokens = np.fromiter((t for i in mine for t in works[i].tokens), np.int64, at)
        members = self._members[name]
        sequences = [self.mirror.sequences[works[i].request] for i in mine]
        batch = Batch(
            tokens_T=self._tensor(tokens),
            positions_T=self._tensor(np.concatenate(positions)),
            bounds=bounds,
            groups=[self._group(g, works, mine) for g in members if self.groups[g].kind is not GroupKind.PARKED],
            logit_rows_N=self._tensor(np.concatenate(logit_rows) if logit_rows else np.empty(0, np.int64)),
            trees=trees,
            vectors=self._vector_rows(vectors),
            sequences=sequences if name == "target" else [self.mirror.plain for _ in mine],
            deltas=Deltas.of(sequences, bounds, self.device) if name == "target" else None,
        )
        return batch, wanted

    def _positions(self, work: Work, context: int) -> Ints:
        if not work.parents:
            return np.arange(work.start, work.start + len(work.tokens))
        depth: list[int] = []
        for p in work.parents:
            depth.append(0 if p < 0 else depth[p] + 1)
        first = work.start + context - (len(depth) - work.guesses)  # position of a guess that follows the context
        guessed = first + np.array(depth[len(depth) - work.guesses :], np.int64)
        return np.concatenate([np.arange(work.start, work.start + context), guessed])

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
