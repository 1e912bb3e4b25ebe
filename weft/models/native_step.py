"""What a program of the kernels needs of one step: where the batch's rows and sequences lie, and which attention is theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from weft.models.operations import Weighing
from weft.ops.cpu.panels import FORMATS
from weft.ops.ref.attention_mass import QUANTA
from weft.ops.ref.attention_plan import ancestors

if TYPE_CHECKING:
    from weft.exec.batch import Batch, GroupBatch
    from weft.exec.kvpool import KVPool
    from weft.models.kernels import Native
    from weft.models.ropes import Ropes
    from weft.ops.attention_call import AttentionCall, ByKernels
    from weft.slots import Store

STORES = {"int8": 2}
"""Encodings of a `kv.store` that the kernels read and write (`Store.kernels`), and what they call them."""


def encoding(store: Store) -> str:
    """What the store's own class says of the kernels: one that inherits from it may encode otherwise."""
    return str(vars(type(store)).get("kernels", ""))


class NativeStep:
    """What the program needs of one step.  Keeps what it points to."""

    def __init__(self, native: Native, batch: Batch, ropes: Ropes | None) -> None:
        self._native, self._step = native, native.module.Step()
        self._kept: list[Any] = [batch]
        self._sequences = len(batch.bounds) - 1
        bounds = np.asarray(batch.bounds, dtype=np.int64)
        trees = self._trees(batch) if batch.trees else ()
        self._kept += [bounds, *trees]
        bits, counts = (x.ctypes.data for x in trees) if trees else (0, 0)
        self._step.rows(
            batch.tokens_T.shape[0], batch.tokens_T.data_ptr(), batch.logit_rows_N.shape[0], batch.logit_rows_N.data_ptr(),
            batch.positions_T.data_ptr(), bounds.ctypes.data, bits, counts,
        )  # fmt: skip
        if ropes is not None:
            self._turn(batch, ropes)

    def _turn(self, batch: Batch, ropes: Ropes) -> None:
        self._kept.append(ropes)
        computed = None
        for index, rope in enumerate(self._native.ropes):
            if self._step.turn(index, *ropes.addresses[rope]):
                continue
            if computed is None:
                computed = ropes(batch.positions_T)
                self._kept.append(computed)
            self._step.angles(index, *(table.data_ptr() for table in computed[rope]))

    def again(self) -> bool:
        """Take in the numbers of a batch that stands (`exec.standing`); False where they need a step of their own."""
        return bool(self._step.again())

    def write_positions(self, where: GroupBatch, pool: KVPool, at: int) -> None:
        """Store the rows' positions in the pool's group `at`, now and with each `again`."""
        positions, apart = pool.position_rows
        self._kept.append(where)
        self._step.write(positions, apart, pool.groups[at].block_tokens, where.slots_T.data_ptr())

    def _trees(self, batch: Batch) -> tuple[Any, Any]:
        """(uint64 [T], the guesses that a row sees as bits; int32 [S], guesses of each sequence)."""
        bits = np.full(batch.bounds[-1], ~np.uint64(0))
        counts = np.zeros(self._sequences, dtype=np.int32)
        for s, parents in batch.trees.items():
            if parents:
                start, stop = batch.bounds[s], batch.bounds[s + 1]
                rows = min(len(parents), stop - start)
                seen = ancestors(parents, stop - start - len(parents)).numpy()[len(parents) - rows :]
                weights = np.uint64(1) << np.arange(len(parents), dtype=np.uint64)
                bits[stop - rows : stop] = (seen * weights).sum(1, dtype=np.uint64)
                counts[s] = len(parents)
        return bits, counts

    def place(
        self, group: int, where: GroupBatch, pool: KVPool, at: int, keep: Tensor | None, plans: Sequence[ByKernels]
    ) -> None:
        """Where the batch lies in a KV group of the model; `at` is its index in the pool.  keep: the rows that are stored.

        plans: the sequences whose attention the kernels compute, and which of them read the same key tiles.
        """
        shape, spec = pool.groups[at], self._native.spec
        stored = FORMATS[pool.dtype] if pool.store is None else STORES[encoding(pool.store)]
        slots, (positions, apart) = where.slots_T, pool.position_rows
        if keep is not None:
            slots = torch.full_like(slots, -1).index_copy_(0, keep, slots[keep])
        self._kept += [where, slots]
        self._step.place(
            group, pool.arena.data_ptr(), pool.block_bytes, positions, apart, shape.block_tokens,
            where.tables_SB.data_ptr(), where.tables_SB.stride(0), where.first_S.data_ptr(), where.lengths_S.data_ptr(),
            slots.data_ptr(), shape.window or 0, stored,
        )  # fmt: skip
        for plan in plans:
            if plan.units is not None:
                plan.sparse = self._sparse(group, plan)
        plans = [plan for plan in plans if plan.units is None]
        sequences = [s for plan in plans for s in plan.sequences.tolist()]
        chunks = max((0 if plan.shared is None else plan.shared.shape[1]) for plan in plans)
        shared, row = np.full((len(sequences), chunks), -1, dtype=np.int64) if chunks else None, 0
        for plan in plans:
            if shared is not None and plan.shared is not None:
                shared[row : row + len(plan.sequences), : plan.shared.shape[1]] = plan.shared
            row += len(plan.sequences)
        self._step.plan(
            group, sequences, 0 if shared is None else shared.ctypes.data, chunks, spec.heads, spec.kv_heads, spec.head_dim,
            self._native.program.threads,
        )  # fmt: skip

    def _sparse(self, group: int, plan: ByKernels) -> Callable[[AttentionCall, Tensor, int], None]:
        """Attention of rows in units, a layer at a time."""
        spec, program = self._native.spec, self._native.program
        assert plan.units is not None
        number = self._step.plan_units(
            group, plan.sequences.tolist(), plan.units.ctypes.data, spec.heads, spec.kv_heads
        )

        def compute(call: AttentionCall, visible: Tensor, block: int) -> None:
            seen = visible.contiguous()
            program.attend_sparse(
                self._step, number, group, seen.data_ptr(), seen.shape[2], block, call.q_THD.data_ptr(), call.q_THD.stride(0),
                call.out_THD.data_ptr(), call.out_THD.stride(0), spec.heads, spec.kv_heads, spec.head_dim, call.scale,
                call.softcap or 0.0, call.pool.groups[call.group].layers.index(call.layer),
            )  # fmt: skip

        return compute

    def weighing(self, group: int, batch: Batch, pool: KVPool, at: int) -> Weighing:
        """What sums attention by entry in a group of the model, of the step's rows that count."""
        spec, asked, shape = self._native.spec, batch.mass, pool.groups[at]
        assert asked is not None
        entries = batch.groups[group].tables_SB.shape[1] * shape.block_tokens

        def weigh(q: Tensor, layer: int, scale: float, softcap: float | None) -> Tensor:
            found = torch.zeros(asked.count, spec.kv_heads, entries, dtype=torch.int64)
            self._native.program.weigh(
                self._step, group, asked.sums_T.data_ptr(), found.data_ptr(), entries, q.data_ptr(), q.stride(0), spec.heads,
                spec.kv_heads, spec.head_dim, scale, softcap or 0.0, shape.layers.index(layer),
            )  # fmt: skip
            return found.double().div_(QUANTA)

        return weigh

    def run(self, first: int, stop: int) -> None:
        self._native.program.run(first, stop, self._step)
