"""A batch that stands: while each sequence has one row in every step, the next numbers go where those of the last step were.

To build a batch takes some twenty operations of NumPy and PyTorch, each of which finds the caches filled with the weights of the
pass before; and who worked out where the rows lie (`models.decoder`) would do it again.  Here numbers are written one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from weft.exec.batch import Batch, GroupBatch
from weft.exec.mirror import Mirror, Mirrored
from weft.types import Work


def stands(batch: Batch, works: Sequence[Work]) -> bool:
    """Whether a batch on a CPU, of these works, has nothing but one row of each that gives a token."""
    return (
        batch.tokens_T.device.type == "cpu"
        and batch.deltas is None
        and batch.vectors is None
        and all(map(single, works))
    )


def single(work: Work) -> bool:
    """Whether a work is one row that gives a token, with nothing else to it."""
    return (
        len(work.tokens) == 1 and work.tokens[0] >= 0 and work.samples and work.layers is None
        and not (work.guesses or work.parents or work.prompt_rows or work.soft)
    )  # fmt: skip


class Table:
    """Where the batch's rows lie in a KV group of the pool, number by number (`GroupBatch`)."""

    __slots__ = ("blocks", "first", "group", "lengths", "size", "slots", "width")

    def __init__(self, group: int, size: int, where: GroupBatch) -> None:
        self.group, self.size, self.width = group, size, where.tables_SB.shape[1]
        self.blocks, self.first = numbers(where.tables_SB), numbers(where.first_S)
        self.lengths, self.slots = numbers(where.lengths_S), numbers(where.slots_T)

    def grant(self, k: int, s: Mirrored) -> bool:
        """Take in what the k-th sequence has now; False where that is more than there is room for."""
        own = s.table(self.group).tolist()
        if len(own) > self.width:
            return False
        begin = k * self.width
        for at, block in enumerate(own + [0] * (self.width - len(own)), begin):
            self.blocks[at] = block
        self.first[k] = s.first[self.group]
        return True

    def place(self, k: int, s: Mirrored, start: int) -> bool:
        """Put the k-th sequence's row at position `start`; False where it has no block for it."""
        g, size = self.group, self.size
        entry = start - s.first[g] if s.count[g] < 0 else s.count[g]
        if not 0 <= entry < s.used[g] * size:
            return False  # who builds a new batch says what is wrong
        self.lengths[k] = entry + 1
        self.slots[k] = self.blocks[k * self.width + entry // size] * size + entry % size
        return True


def numbers(tensor: Tensor) -> memoryview:
    """A tensor's memory, [n] int64."""
    return tensor.numpy().reshape(-1).data


class Standing:
    """batch: of the works with these indices, for which `stands` holds.  groups: of the pool, those that it has tables of."""

    def __init__(
        self, batch: Batch, works: Sequence[Work], mine: Sequence[int], mirror: Mirror, groups: Sequence[int]
    ) -> None:
        self.batch = batch
        self._mirror, self._mine = mirror, list(mine)
        self._sequences = [mirror.sequences[works[i].request] for i in mine]
        self._grants = [s.grants for s in self._sequences]
        self._tokens, self._positions = numbers(batch.tokens_T), numbers(batch.positions_T)
        self._tables = [
            Table(g, mirror.groups[g].block_tokens, where) for g, where in zip(groups, batch.groups, strict=True)
        ]

    def follow(self, works: Sequence[Work], mine: Sequence[int]) -> bool:
        """Take in the next step's works.

        False where they are others than single rows of the same sequences, or the batch has no room for them: then it is worth
        nothing any more.
        """
        if mine != self._mine or self.batch.mass is not None:
            return False
        sequences, grants, tables = self._mirror.sequences, self._grants, self._tables
        for k, i in enumerate(mine):
            work, s = works[i], self._sequences[k]
            if not single(work) or sequences[work.request] is not s:
                return False
            if s.grants != grants[k]:
                if not all(table.grant(k, s) for table in tables):
                    return False
                grants[k] = s.grants
            start = work.rows[0][0]
            self._tokens[k], self._positions[k] = work.tokens[0], start
            for table in tables:
                if not table.place(k, s, start):
                    return False
        self.batch.stands = True
        return True
