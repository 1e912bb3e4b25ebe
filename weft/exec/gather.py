"""From a plan's works to a batch: rows flattened in their order, tables, slots, vectors, and whose logits are wanted.

Soft tokens are rows of a tree behind a work's own: they see the context, the guesses that they follow, and those before them.
Their entries are written behind the work's, where the next step writes over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from weft.exec.batch import Batch, GroupBatch
from weft.exec.deltas import Deltas
from weft.exec.kvpool import KVPool
from weft.exec.mirror import Ints, Mirror
from weft.slots import Target
from weft.types import GroupKind, Work


@dataclass(slots=True)
class Wanted:
    """Which rows of a batch's logits belong to a work: prompt rows first, then the sampled ones."""

    work: int
    first: int
    prompt_rows: int
    sampled: int


class Gather:
    """Builds batches from what the mirror knows.  members: the pool's groups of each model.  target: as drafts see it."""

    def __init__(self, mirror: Mirror, pool: KVPool, members: dict[str, list[int]], target: Target) -> None:
        self._target = target
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
        full = [softened(works[i]) for i in mine]
        for s, (i, work) in enumerate(zip(mine, full, strict=True)):
            count, own = len(work.tokens), len(works[i].tokens)
            context = count - work.guesses
            positions.append(self._positions(work, context))
            if work.parents:
                first = count - len(work.parents)
                trees[s] = tuple(first - 1 if p < 0 else first + p for p in work.parents)
            if -1 in works[i].tokens:
                vectors.extend(self._vectors(works[i], at))
            if work.soft:
                learned = self.mirror.sequences[work.request].stack["draft"].vectors(self._target)[: work.soft]
                vectors.append((at + own, learned.repeat(1 + works[i].guesses, 1)))
            sampled = min(own, 1 + works[i].guesses) if work.samples else 0
            if sampled or work.prompt_rows:
                wanted.append(Wanted(i, taken, work.prompt_rows, sampled))
                rows = range(at, at + work.prompt_rows), range(at + own - sampled, at + own)
                logit_rows.extend(np.arange(r.start, r.stop) for r in rows)
                taken += work.prompt_rows + sampled
            at += count
            bounds.append(at)
        tokens = np.fromiter((t for work in full for t in work.tokens), np.int64, at)
        members = self._members[name]
        sequences = [self.mirror.sequences[work.request] for work in full]
        batch = Batch(
            tokens_T=self._tensor(tokens),
            positions_T=self._tensor(np.concatenate(positions)),
            bounds=bounds,
            groups=[self._group(g, full) for g in members if self.groups[g].kind is not GroupKind.PARKED],
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

    def _group(self, g: int, works: Sequence[Work]) -> GroupBatch:
        sequences = [self.mirror.sequences[work.request] for work in works]
        tables = np.zeros((len(works), max(s.used[g] for s in sequences)), np.int64)
        lengths = np.empty(len(works), np.int64)
        slots = []
        for row, (work, s) in enumerate(zip(works, sequences, strict=True)):
            tables[row, : s.used[g]] = s.table(g)
            lengths[row] = self.mirror.entry(work, g) + len(work.tokens)
            slots.append(self.mirror.slots(work, g))
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


def softened(work: Work) -> Work:
    """The work with its soft tokens as guesses of a tree, behind all others; itself where it has none."""
    if not work.soft:
        return work
    parents = list(work.parents or range(-1, work.guesses - 1))
    for node in range(-1, work.guesses):
        parents.append(node)
        parents.extend(range(len(parents) - 1, len(parents) + work.soft - 2))
    tokens = (*work.tokens, *[-1] * work.ahead)
    return msgspec.structs.replace(work, tokens=tokens, guesses=len(parents), parents=tuple(parents))
