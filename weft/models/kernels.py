"""A decoder's operations on the kernels: the list of `models/operations.py`, with calls into a program in place of torch.

Calls that follow each other are run as one, without coming back to Python.  Where attention is another technique's, or keys are
encoded by a `kv.store`, those two operations are the reference ones, over the same buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from weft.models.operations import Material, Operation, Run, Seam, Step, Weighing, attend, store
from weft.models.spec import DecoderSpec, LayerSpec, RopeSpec
from weft.ops.choice import ACTIVATIONS
from weft.ops.cpu.drawing import Drawing
from weft.ops.cpu.panels import FORMATS, Panels
from weft.ops.ref.attention_mass import QUANTA
from weft.ops.ref.attention_plan import ancestors

if TYPE_CHECKING:
    from weft.exec.batch import Batch, GroupBatch
    from weft.exec.kvpool import KVPool
    from weft.ops.attention_call import AttentionCall, ByKernels
    from weft.slots import Store

STORES = {"int8": 2}
"""Encodings of a `kv.store` that the kernels read and write (`Store.kernels`), and what they call them."""
INPUTS = {"float32": 0, "bfloat16": 1, "int8": 2}
"""What inputs of products may be rounded to, and what the kernels call it: bfloat16 where instructions multiply it,
8 bits where the weights are whole numbers."""
MAX_GUESSES = 64
"""Guesses of a tree that the kernels know apart."""


def encoding(store: Store) -> str:
    """What the store's own class says of the kernels: one that inherits from it may encode otherwise."""
    return str(vars(type(store)).get("kernels", ""))


@dataclass(frozen=True, slots=True)
class Call:
    """Operations [first, stop) of the program."""

    first: int
    stop: int

    def __call__(self, step: Step) -> None:
        assert step.native is not None
        step.native.run(self.first, self.stop)


def fused(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The same, with calls that follow each other as one."""
    found: list[Run] = []
    for run in runs:
        last = found[-1] if found else None
        if isinstance(run, Call) and isinstance(last, Call) and last.stop == run.first:
            found[-1] = Call(last.first, run.stop)
        else:
            found.append(run)
    return tuple(found)


class NativeStep:
    """What the program needs of one step.  Keeps what it points to."""

    def __init__(self, native: Native, batch: Batch, ropes: Mapping[RopeSpec, tuple[Tensor, Tensor]]) -> None:
        self._native, self._step = native, native.module.Step()
        self._kept: list[Any] = [batch, ropes]
        self._sequences = len(batch.bounds) - 1
        bounds = np.asarray(batch.bounds, dtype=np.int64)
        bits, trees = self._trees(batch)
        self._kept += [bounds, bits, trees]
        self._step.rows(
            batch.tokens_T.shape[0], batch.tokens_T.data_ptr(), batch.logit_rows_N.shape[0], batch.logit_rows_N.data_ptr(),
            batch.positions_T.data_ptr(), bounds.ctypes.data, bits.ctypes.data if batch.trees else 0,
            trees.ctypes.data if batch.trees else 0,
        )  # fmt: skip
        for index, rope in enumerate(native.ropes):
            if rope in ropes:
                self._step.angles(index, *(table.data_ptr() for table in ropes[rope]))

    def _trees(self, batch: Batch) -> tuple[Any, Any]:
        """(uint64 [T], the guesses that a row sees as bits; int32 [S], guesses of each sequence)."""
        bits = np.full(batch.bounds[-1] if batch.trees else 0, ~np.uint64(0))
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
        positions, slots = pool.positions(at), where.slots_T
        if keep is not None:
            slots = torch.full_like(slots, -1).index_copy_(0, keep, slots[keep])
        self._kept += [where, slots]
        self._step.place(
            group, pool.arena.data_ptr(), pool.block_bytes, positions.data_ptr(), positions.stride(0), shape.block_tokens,
            where.tables_SB.data_ptr(), where.tables_SB.stride(0), where.first_S.data_ptr(), where.lengths_S.data_ptr(),
            slots.data_ptr(), shape.window or 0, stored,
        )  # fmt: skip
        for plan in plans:
            if plan.units is not None:
                plan.sparse = self._sparse(group, plan)
        plans = [plan for plan in plans if plan.units is None]
        sequences = np.concatenate([plan.sequences for plan in plans])
        chunks = max((0 if plan.shared is None else plan.shared.shape[1]) for plan in plans)
        shared, row = np.full((len(sequences), chunks), -1, dtype=np.int64), 0
        for plan in plans:
            if plan.shared is not None:
                shared[row : row + len(plan.sequences), : plan.shared.shape[1]] = plan.shared
            row += len(plan.sequences)
        self._step.plan(
            group, sequences.tolist(), shared.ctypes.data if chunks else 0, chunks, spec.heads, spec.kv_heads, spec.head_dim,
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


class Native:
    """One decoder's program.  module: the extension.  inputs: what those of products may be rounded to (`INPUTS`)."""

    def __init__(
        self, module: Any, spec: DecoderSpec, threads: int, isa: str = "auto", inputs: str = "float32"
    ) -> None:
        self.module, self.spec, self.inputs = module, spec, INPUTS[inputs]
        self.program = module.Program(threads, isa)
        self.drawing = Drawing(self.program, module.Program(1, isa))
        self.chunk: int = module.CHUNK
        """Entries of a key tile that sequences may share."""
        self.ropes = tuple(dict.fromkeys(layer.rope for layer in spec.layers if layer.rope is not None))
        self.head = -1
        """The first operation of the head."""
        self._kept: list[Tensor] = []

    def begin(self, batch: Batch, ropes: Mapping[RopeSpec, tuple[Tensor, Tensor]]) -> NativeStep:
        return NativeStep(self, batch, ropes)

    def attends(self, batch: Batch, pool: KVPool) -> bool:
        """Whether the kernels compute the attention of this step, if it is dense."""
        guesses = max((len(parents) for parents in batch.trees.values()), default=0)
        return (pool.store is None or encoding(pool.store) in STORES) and guesses <= MAX_GUESSES

    def finish(self, last: Run, count: int) -> None:
        """Run the operations of the head, which end with `last`, for the first rows of the buffer `picked`."""
        assert isinstance(last, Call)
        step = self.module.Step()
        step.rows(0, 0, count, 0, 0, 0, 0, 0)
        self.program.run(self.head, last.stop, step)

    def floats(self, x: Tensor, offset: float = 0.0) -> int:
        """Address of a float32 copy, which lives as long as the program."""
        self._kept.append((x.float() + offset).contiguous())
        return self._kept[-1].data_ptr()

    def call(self, index: int) -> Call:
        return Call(index, index + 1)

    # ------------------------------------------------------------------------------------------ operations

    def linear(
        self, m: Material, x: Tensor, weight: Panels, bias: Tensor | None, out: Tensor, picked: bool = False
    ) -> Call:
        return self.call(self.program.linear(
            weight.weight, x.data_ptr(), x.stride(0), 0 if bias is None else self.floats(bias), out.data_ptr(), out.stride(0),
            picked, self.inputs,
        ))  # fmt: skip

    def norm(self, m: Material, x: Tensor, weight: Tensor, out: Tensor, heads: int = 1, picked: bool = False) -> Call:
        address = self.floats(weight, m.spec.norm_offset)
        return self.call(self.program.norm(
            x.data_ptr(), x.stride(0), address, out.data_ptr(), out.stride(0), heads, weight.shape[0], m.spec.norm_eps, picked
        ))  # fmt: skip

    def turn(self, m: Material, x: Tensor, layer: LayerSpec, heads: int, kv_heads: int) -> list[Run]:
        """Norms of heads, and rope, of x [T, heads + kv_heads, D] (or more), in place."""
        runs: list[Run] = []
        q_norm, k_norm = m.weight(layer, "q_norm"), m.weight(layer, "k_norm")
        if q_norm is not None and k_norm is not None:
            flat = x.flatten(1)
            if heads:
                runs.append(self.norm(m, flat, q_norm, flat, heads))
            keys = flat[:, heads * m.spec.head_dim :]
            runs.append(self.norm(m, keys, k_norm, keys, kv_heads))
        if layer.rope is not None:
            at = self.ropes.index(layer.rope)
            stride, dim = x.stride(0), m.spec.head_dim
            index = self.program.rope(x.data_ptr(), stride, heads + kv_heads, dim, layer.rope.dim // 2, at)
            runs.append(self.call(index))
        return runs


def operations(m: Material, native: Native) -> list[Operation]:
    """The whole list, for a model that `weft.ops.choice` gives to the kernels."""
    hidden, logits = m.buffers["hidden"], m.buffers["logits"]
    last = len(m.spec.layers) - 1
    found = [Operation(0, _embed(m, native), Seam.INPUTS, lambda step: (hidden[: step.rows],))]
    for index, layer in enumerate(m.spec.layers):
        found += _attention(m, native, index, layer)
        found += _mlp(m, native, index, layer) if layer.experts is None else _experts(m, native, index, layer)
        output = _add(m, native, layer, "norm_mlp_out")
        found.append(Operation(index, output, Seam.OUTPUT, lambda step: (hidden[: step.rows],)))
    pick = native.program.pick(hidden.data_ptr(), hidden.stride(0), m.buffers["picked"].data_ptr(), m.spec.width)
    runs: tuple[Run, ...] = (native.call(pick), *head(m, native))
    found.append(Operation(last, runs, Seam.LOGITS, lambda step: (logits[: step.batch.logit_rows_N.shape[0]],)))
    return found


def head(m: Material, native: Native) -> list[Run]:
    """From the first rows of the buffer `picked`, which are hidden states, to as many rows of logits."""
    picked, logits, spec = m.buffers["picked"], m.buffers["logits"], m.spec
    weight: Any = m.tensors["embed" if spec.tied else "head"]
    native.head = len(native.program)
    runs: list[Run] = [
        native.norm(m, picked, m.tensors["norm"], picked, picked=True),
        native.linear(m, picked, weight, None, logits, picked=True),
    ]
    if spec.final_softcap is not None:
        runs.append(native.call(native.program.softcap(logits.data_ptr(), spec.outputs, spec.final_softcap)))
    return runs


def _embed(m: Material, native: Native) -> tuple[Run, ...]:
    hidden, table = m.buffers["hidden"], m.tensors["embed"]
    assert isinstance(table, Panels)
    index = native.program.embed(table.weight, m.spec.embedding_scale, hidden.data_ptr(), hidden.stride(0))

    def vectors(step: Step) -> None:
        if step.batch.vectors is not None:
            rows, values = step.batch.vectors
            hidden[: step.rows].index_copy_(0, rows, values)

    return native.call(index), vectors


def _product(m: Material, native: Native, index: int, x: Tensor, layer: LayerSpec, name: str, out: Tensor) -> Operation:
    weight: Any = m.weight(layer, name)
    call = native.linear(m, x, weight, m.weight(layer, f"{name}_bias"), out)

    def delta(step: Step) -> None:
        assert step.batch.deltas is not None
        step.batch.deltas.add(layer.weights, name, x, out)

    return Operation(index, (call,), adapted=(call, delta))


def _add(m: Material, native: Native, layer: LayerSpec, norm: str) -> tuple[Run, ...]:
    hidden, projected = m.buffers["hidden"], m.buffers["projected"]
    weight = m.weight(layer, norm)
    runs: list[Run] = [] if weight is None else [native.norm(m, projected, weight, projected)]
    runs.append(
        native.call(native.program.add(hidden.data_ptr(), projected.data_ptr(), hidden.stride(0), m.spec.width))
    )
    return tuple(runs)


def _normed(m: Material, native: Native, index: int, weight: Tensor | None) -> tuple[Tensor, list[Operation]]:
    """What a product reads, and the operation that makes it: the stream itself where the layer has no norm there."""
    hidden, normed = m.buffers["hidden"], m.buffers["normed"]
    if weight is None:
        return hidden, []
    return normed, [Operation(index, (native.norm(m, hidden, weight, normed),))]


def _attention(m: Material, native: Native, index: int, layer: LayerSpec) -> list[Operation]:
    spec, qkv, program = m.spec, m.buffers["qkv"], native.program
    heads, kv_heads, dim = spec.heads, spec.kv_heads, spec.head_dim
    split = qkv.view(qkv.shape[0], heads + 2 * kv_heads, dim)
    q, k, v = split[:, :heads], split[:, heads:-kv_heads], split[:, -kv_heads:]
    attended = m.buffers["attended"]
    group = m.group_of[index]
    place = m.groups[group].layers.index(index)
    shaped = attended.view(-1, heads, dim)
    # The program's order is the order in which operations are made here: only then are they run as one.
    x, found = _normed(m, native, index, m.weight(layer, "norm_attention"))
    found.append(_product(m, native, index, x, layer, "qkv", qkv))
    turned = tuple(native.turn(m, split[:, :-kv_heads], layer, heads, kv_heads))
    views = (q, k, v)
    found.append(Operation(index, turned, Seam.QKV, lambda step: tuple(view[: step.rows] for view in views)))
    call = native.call(program.store(group, k.data_ptr(), v.data_ptr(), qkv.stride(0), kv_heads, dim, place))
    found.append(Operation(index, (store(m, index, k, v),), dense=(call,)))
    call = native.call(program.attend(
        group, q.data_ptr(), qkv.stride(0), attended.data_ptr(), attended.stride(0), heads, kv_heads, dim,
        layer.query_scale, layer.attention_softcap or 0.0, place,
    ))  # fmt: skip
    seen = lambda step: (shaped[: step.rows],)
    rest = attend(m, index, layer, q, shaped)
    found.append(Operation(index, (rest,), Seam.ATTENTION, seen, dense=(call,), others=(rest,)))
    found.append(_product(m, native, index, attended, layer, "out", m.buffers["projected"]))
    return [*found, Operation(index, _add(m, native, layer, "norm_attention_out"))]


def _mlp(m: Material, native: Native, index: int, layer: LayerSpec) -> list[Operation]:
    inner, rows = layer.intermediate, m.buffers["gated"].shape[0]
    gated = m.buffers["gated"].flatten()[: rows * inner].view(rows, inner)
    gate_up = m.buffers["gate_up"].flatten()[: rows * 2 * inner].view(rows, 2 * inner)
    x, norm = _normed(m, native, index, m.weight(layer, "norm_mlp"))
    up = _product(m, native, index, x, layer, "gate_up", gate_up)
    activate = native.program.gated(
        gate_up.data_ptr(), gate_up.stride(0), gated.data_ptr(), gated.stride(0), inner, ACTIVATIONS[layer.activation]
    )
    down = _product(m, native, index, gated, layer, "down", m.buffers["projected"])
    return [
        *norm, up, Operation(index, (native.call(activate),), Seam.GATE, lambda step: (gated[: step.rows],)), down,
    ]  # fmt: skip


def _experts(m: Material, native: Native, index: int, layer: LayerSpec) -> list[Operation]:
    program, buffers, width, experts = native.program, m.buffers, m.spec.width, layer.experts
    assert experts is not None
    num, each, inner, rows = experts.num, experts.top_k, experts.intermediate, buffers["router"].shape[0]
    router = buffers["router"].flatten()[: rows * num].view(rows, num)
    shares = buffers["shares"][: rows * each].view(rows, each)
    ids = buffers["ids"].view(torch.int64)[: rows * each].view(rows, each)
    gate_up, gated = (buffers[name].data_ptr() for name in ("pair_gate_up", "pair_gated"))
    inputs, outputs = (buffers[name].data_ptr() for name in ("pair_inputs", "pair_outputs"))
    x, norm = _normed(m, native, index, m.weight(layer, "norm_mlp"))
    product = native.linear(m, x, m.weight(layer, "router"), None, router)
    mixture = native.module.Experts(
        router.data_ptr(), num, shares.data_ptr(), ids.data_ptr(), x.data_ptr(), x.stride(0), buffers["projected"].data_ptr(),
        width, inputs, outputs, width, num, each, experts.normalize,
    )  # fmt: skip
    up, down = ([part.weight for part in m.weight(layer, f"experts_{name}").parts] for name in ("gate_up", "down"))
    routed = native.call(program.route(mixture))
    runs = (
        native.call(program.gather(mixture)),
        native.call(program.expert_products(up, inputs, width, gate_up, 2 * inner, native.inputs)),
        native.call(program.expert_gated(gate_up, gated, inner, ACTIVATIONS[layer.activation])),
        native.call(program.expert_products(down, gated, inner, outputs, width, native.inputs)),
        native.call(program.combine(mixture)),
    )
    return [
        *norm,
        Operation(index, (product,)),
        Operation(index, (routed,), Seam.GATE, lambda step: (shares[: step.rows], ids[: step.rows])),
        Operation(index, runs),
    ]


def filling(m: Material, native: Native, index: int) -> Callable[[Step, int], None]:
    """As `models.operations.filling`."""
    spec, layer = m.spec, m.spec.layers[index]
    first, wide = spec.heads * spec.head_dim, 2 * spec.kv_heads * spec.head_dim
    weight, bias = m.weight(layer, "qkv").rows(first), m.weight(layer, "qkv_bias")
    rows = m.buffers["qkv"].shape[0]
    out = m.buffers["qkv"].flatten()[: rows * wide].view(rows, wide)
    split = out.view(rows, 2 * spec.kv_heads, spec.head_dim)
    k, v = split[:, : spec.kv_heads], split[:, spec.kv_heads :]
    x, norm = _normed(m, native, index, m.weight(layer, "norm_attention"))
    product = native.linear(m, x, weight, None if bias is None else bias[first:], out)
    before = fused([*(run for operation in norm for run in operation.runs), product])
    turned = fused(native.turn(m, split, layer, 0, spec.kv_heads))

    def run(step: Step, at: int) -> None:
        for call in before:
            call(step)
        if step.batch.deltas is not None:
            step.batch.deltas.add(layer.weights, "qkv", x, out, first)
        for call in turned:
            call(step)
        step.pool.write_rows(at, index, step.stored[m.group_of[index]], k[: step.rows], v[: step.rows])

    return run
