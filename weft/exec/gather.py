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
from weft.exec.standing import Standing, stands
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
        self._standing: tuple[Standing, list[Wanted]] | None = None

    def step(self, name: str, works: Sequence[Work], mine: Sequence[int]) -> tuple[Batch, list[Wanted]]:
        """As `batch`, whose tensors it may use for the next step's; nobody may keep them for longer than a step.

        name: the target's, in every call.
        """
        if self._standing is not None:
            standing, wanted = self._standing
            if standing.follow(works, mine):
                return standing.batch, wanted
        batch, wanted = self.batch(name, works, mine)
        self._standing = None
        if stands(batch, [works[i] for i in mine]):
            self._standing = Standing(batch, works, mine, self.mirror, self._tabled(name)), wanted
        return batch, wanted

    def _tabled(self, name: str) -> list[int]:
        return [g for g in self._members[name] if self.groups[g].kind is not GroupKind.PARKED]

    def batch(self, name: str, works: Sequence[Work], mine: Sequence[int]) -> tuple[Batch, list[Wanted]]:
        """The works' rows, flattened in their order, and where the logits of each will stand."""
        full = [softened(works[i]) for i in mine]
        # Lists, and one array of each in the end: behind a pass, which fills the caches, every operation on arrays is dear.
        bounds, tokens, positions, logit_rows = [0], list[int](), list[int](), list[int]()
        wanted: list[Wanted] = []
        trees: dict[int, tuple[int, ...]] = {}
        vectors: list[tuple[int, Tensor]] = []
        for s, (i, work) in enumerate(zip(mine, full, strict=True)):
            own, at = len(works[i].tokens), len(tokens)
            tokens.extend(work.tokens)
            positions.extend(range(work.start, work.start + len(work.tokens)))
            bounds.append(len(tokens))
            if work.parents:
                places, trees[s] = self._tree(work)
                positions[len(tokens) - len(places) :] = places
            if -1 in works[i].tokens:
                vectors.extend(self._vectors(works[i], at))
            if work.soft:
                learned = self.mirror.sequences[work.request].stack["draft"].vectors(self._target)[: work.soft]
                vectors.append((at + own, learned.repeat(1 + works[i].guesses, 1)))
            sampled = min(own, 1 + works[i].guesses) if work.samples else 0
            if sampled or work.prompt_rows:
                wanted.append(Wanted(i, len(logit_rows), work.prompt_rows, sampled))
                logit_rows.extend(range(at, at + work.prompt_rows))
                logit_rows.extend(range(at + own - sampled, at + own))
        sequences = [self.mirror.sequences[work.request] for work in full]
        batch = Batch(
            tokens_T=self._tensor(np.array(tokens, np.int64)),
            positions_T=self._tensor(np.array(positions, np.int64)),
            bounds=bounds,
            groups=[self._group(g, full) for g in self._tabled(name)],
            logit_rows_N=self._tensor(np.array(logit_rows, np.int64)),
            trees=trees,
            vectors=self._vector_rows(vectors),
            sequences=sequences if name == "target" else [self.mirror.plain for _ in mine],
            deltas=Deltas.of(sequences, bounds, self.device) if name == "target" else None,
        )
        return batch, wanted

    def _tree(self, work: Work) -> tuple[list[int], tuple[int, ...]]:
        """(places in the text of a tree's guesses, what each of its nodes follows (`Batch.trees`))."""
        depth: list[int] = []
        for p in work.parents:
            depth.append(0 if p < 0 else depth[p] + 1)
        first = len(work.tokens) - len(depth)  # of the nodes, those before the guesses were computed in an earlier pass
        places = [work.start + first + d for d in depth[len(depth) - work.guesses :]]
        return places, tuple(first - 1 if p < 0 else first + p for p in work.parents)

    def _group(self, g: int, works: Sequence[Work]) -> GroupBatch:
        sequences, slots, lengths = [self.mirror.sequences[work.request] for work in works], list[int](), list[int]()
        tables = np.zeros((len(works), max(s.used[g] for s in sequences)), np.int64)
        for row, (work, s) in enumerate(zip(works, sequences, strict=True)):
            tables[row, : s.used[g]] = s.table(g)
            slots.extend(self.mirror.slots(work, g))
            lengths.append(self.mirror.entry(work, g) + len(work.tokens))
        found = (np.array(x, np.int64) for x in ([s.first[g] for s in sequences], lengths, slots))
        return GroupBatch(self._tensor(tables), *map(self._tensor, found))

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
