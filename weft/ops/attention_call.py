"""What the slot `attention` works on: some sequences of a batch in one KV group, and the operations over them.

A technique decides (which blocks a row sees, who shares what) and says it to one of the operations; the arithmetic is theirs.

Legend.  T: rows of the batch.  S: sequences.  H: query heads.  KV: kv heads.  D: head_dim.  U: units.  B: blocks of entries.
K: key tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from weft.ops.ref.attention_plan import AttentionPlan, Bools, Ints
from weft.ops.ref.shared_prefix import SharedPlan
from weft.ops.ref.tiles import Tiling

if TYPE_CHECKING:
    from weft.exec.batch import Batch, GroupBatch
    from weft.exec.kvpool import KVPool
    from weft.ops import Ops


@dataclass(slots=True)
class AttentionCall:
    """One KV group of one step, for the sequences whose stack has the same technique; then, one after the other, its layers.

    Of the step:
    batch, where    the rows, and where their sequences are in this group.  Every row of `sequences` is to be written, no other
    pool, group     the KV pool, and the group's index in it; read entries by `keys`, not from the pool's memory
    sequences       indices of sequences of the batch, ascending.  batch.sequences[s] has `prompt`, the prompt's length
    heads, tiling   query heads, and the sizes of tiles (`tiling.keys`: entries of a key tile)
    chunk           where weft's kernels compute dense attention: entries of a key tile of theirs, else 0
    kernels         the plan that was given to them

    Of the layer, before each `run`:
    layer           index in the model
    q_THD, out_THD  queries after rope, rows of the batch; where the result goes
    scale, softcap  of the scores
    """

    ops: Ops
    batch: Batch
    where: GroupBatch
    pool: KVPool
    group: int
    sequences: Ints
    heads: int
    tiling: Tiling
    chunk: int = 0
    kernels: ByKernels | None = None
    layer: int = -1
    q_THD: Tensor = field(default_factory=lambda: torch.empty(0))
    out_THD: Tensor = field(default_factory=lambda: torch.empty(0))
    scale: float = 1.0
    softcap: float | None = None

    @property
    def kv_heads(self) -> int:
        return self.pool.specs[self.model].kv_heads

    @property
    def model(self) -> str:
        """Whose layers these are; "target" for the model that answers."""
        return self.pool.groups[self.group].model

    @property
    def window(self) -> int | None:
        """Positions that a query of this group sees, itself included; None for all."""
        return self.pool.groups[self.group].window

    def keys(self, sequence: int, stop: int) -> Tensor:
        """The layer's keys of a sequence's first `stop` entries (counted from its table's head), float32 [stop, KV, D]."""
        size = self.pool.groups[self.group].block_tokens
        blocks = self.where.tables_SB[sequence, : -(-stop // size)]
        offsets = torch.arange(size, device=blocks.device)
        rows = self.pool.row_of(self.group, blocks[:, None], offsets).flatten()[:stop] * self.kv_heads
        heads = rows[:, None] + torch.arange(self.kv_heads, device=blocks.device)
        return self.pool.gather(self.group, self.layer, False, heads)

    @property
    def key_tile(self) -> int:
        """Entries of a key tile that `sharing` speaks of."""
        return self.chunk or self.tiling.keys

    @property
    def few_rows(self) -> int:
        """Rows of one sequence that may share key tiles with others'."""
        return KERNEL_ROWS if self.chunk else self.tiling.decode

    # ------------------------------------------------------------------------------------------ plans, once a step

    def tiles(self, units: Ints | None = None) -> AttentionPlan | ByKernels:
        """A plan for `dense` and `sparse`.  units: int64 [T], see AttentionPlan."""
        if self.chunk:
            self.kernels = ByKernels(self.sequences, self.chunk, units=units)
            return self.kernels
        return AttentionPlan(*self._place, only=self._only, units=units)

    def sharing(self, shared_SK: Ints) -> SharedPlan | ByKernels:
        """A plan for `shared`.  shared_SK: see SharedPlan; of key tiles of `key_tile` entries."""
        if self.chunk:
            self.kernels = ByKernels(self.sequences, self.chunk, shared_SK[self.sequences])
            return self.kernels
        return SharedPlan(*self._place, shared_SK, only=self._only)

    @property
    def _place(self) -> tuple[Batch, GroupBatch, KVPool, int, int, Tiling]:
        return self.batch, self.where, self.pool, self.group, self.heads, self.tiling

    @property
    def _only(self) -> Bools:
        only = np.zeros(len(self.batch.bounds) - 1, dtype=bool)
        only[self.sequences] = True
        return only

    # ------------------------------------------------------------------------------------------ operations, once a layer

    def dense(self, plan: AttentionPlan | ByKernels) -> None:
        """Every row sees all that it may see."""
        if isinstance(plan, ByKernels):
            assert plan.units is None, "rows in units are computed by `sparse`"
            return  # computed already, with the sequences that have no technique
        self.ops.attention(self.q_THD, self.pool, self.layer, plan, **self._given)

    def sparse(self, plan: AttentionPlan | ByKernels, visible_UKB: Tensor, block: int) -> None:
        """Every unit of the plan's rows sees, for each kv head, the visible blocks of that.  The plan is one with units."""
        if isinstance(plan, ByKernels):
            assert plan.sparse is not None
            plan.sparse(self, visible_UKB, block)
            return
        self.ops.block_sparse_attention(self.q_THD, self.pool, self.layer, plan, visible_UKB, block, **self._given)

    def shared(self, plan: SharedPlan | ByKernels) -> None:
        """As `dense`; key tiles that several sequences read are read once."""
        if isinstance(plan, ByKernels):
            return
        self.ops.shared_attention(self.q_THD, self.pool, self.layer, plan, **self._given)

    @property
    def _given(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap, "out_THD": self.out_THD}


@dataclass(slots=True)
class ByKernels:
    """A plan that weft's kernels carry out.  chunk: entries of a key tile.  shared: int64 [sequences, tiles], or None.

    units: int64 [T] of rows that see blocks of entries, or None.  sparse: what computes those, of one step.
    """

    sequences: Ints
    chunk: int
    shared: Ints | None = None
    units: Ints | None = None
    sparse: Callable[[AttentionCall, Tensor, int], None] | None = None

    @property
    def saved(self) -> int:
        """Entries of one layer that are not read again, since another's read serves."""
        if self.shared is None:
            return 0
        readers = sum(int((column >= 0).sum()) - len(set(column[column >= 0].tolist())) for column in self.shared.T)
        return readers * self.chunk


KERNEL_ROWS = 8


class Dense:
    """What computes the sequences whose stack has no technique in the slot."""

    def plan(self, call: AttentionCall) -> AttentionPlan | ByKernels:
        return call.tiles()

    def run(self, call: AttentionCall, plan: AttentionPlan | ByKernels) -> None:
        call.dense(plan)


DENSE = Dense()


def by_technique(batch: Batch) -> list[tuple[Any, Ints]]:
    """(technique, sequences that it computes), `DENSE` for those without one; equal techniques of several stacks are one."""
    found: list[tuple[Any, list[int]]] = []
    for s in range(len(batch.bounds) - 1):
        technique = batch.sequences[s].stack.get("attention") if batch.sequences else None
        technique = DENSE if technique is None else technique
        for known, members in found:
            if known is technique or known == technique:
                members.append(s)
                break
        else:
            found.append((technique, [s]))
    return [(technique, np.asarray(members, dtype=np.int64)) for technique, members in found]
