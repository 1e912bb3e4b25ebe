"""A decoder's operations on the kernels: the list of `models/operations.py`, with calls into a program in place of torch.

Calls that follow each other are run as one, without coming back to Python.  Where attention is another technique's, or keys are
encoded by a `kv.store`, those two operations are the reference ones, over the same buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.models.native_step import STORES, NativeStep, encoding
from weft.models.operations import Material, Operation, Run, Seam, Step, attend, store, vectors
from weft.models.spec import DecoderSpec, LayerSpec
from weft.ops.choice import ACTIVATIONS
from weft.ops.cpu.drawing import Drawing
from weft.ops.cpu.panels import Panels

if TYPE_CHECKING:
    from weft.exec.batch import Batch
    from weft.exec.kvpool import KVPool
    from weft.models.ropes import Ropes

INPUTS = {"float32": 0, "bfloat16": 1, "int8": 2}
"""What inputs of products may be rounded to, and what the kernels call it: bfloat16 where instructions multiply it,
8 bits where the weights are whole numbers."""
MAX_GUESSES = 64
"""Guesses of a tree that the kernels know apart."""


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

    def begin(self, batch: Batch, ropes: Ropes | None) -> NativeStep:
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

    def gated_linear(
        self, m: Material, x: Tensor, weight: Panels, bias: Tensor | None, both: Tensor, out: Tensor, activation: str
    ) -> Call:
        """both: memory for the product itself, where the kernels need any."""
        return self.call(self.program.gated_linear(
            weight.weight, x.data_ptr(), x.stride(0), 0 if bias is None else self.floats(bias), both.data_ptr(), both.stride(0),
            out.data_ptr(), out.stride(0), ACTIVATIONS[activation], self.inputs,
        ))  # fmt: skip

    def mlp(self, m: Material, x: Tensor, layer: LayerSpec, both: Tensor, gated: Tensor, out: Tensor) -> Call:
        """Gates, what they open, and the product that reads it.  both, gated: memory, where the kernels need any."""
        up, down = m.weight(layer, "gate_up"), m.weight(layer, "down")
        biases = [m.weight(layer, f"{name}_bias") for name in ("gate_up", "down")]
        first, second = (0 if bias is None else self.floats(bias) for bias in biases)
        return self.call(self.program.mlp(
            up.weight, x.data_ptr(), x.stride(0), first, both.data_ptr(), both.stride(0), gated.data_ptr(), gated.stride(0),
            ACTIVATIONS[layer.activation], down.weight, second, out.data_ptr(), out.stride(0), self.inputs,
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
    seen = lambda step: (hidden[: step.rows],)
    found = [Operation(0, _embed(m, native), Seam.INPUTS, seen, vectors=(vectors(m),))]
    for index, layer in enumerate(m.spec.layers):
        found += _attention(m, native, index, layer)
        found += _mlp(m, native, index, layer) if layer.experts is None else _experts(m, native, index, layer)
        output = _add(m, native, layer, "norm_mlp_out")
        found.append(Operation(index, output, Seam.OUTPUT, lambda step: (hidden[: step.rows],)))
    pick = native.program.pick(hidden.data_ptr(), hidden.stride(0), m.buffers["picked"].data_ptr(), m.spec.width)
    runs: tuple[Run, ...] = (native.call(pick), *head(m, native))
    found.append(Operation(last, runs, Seam.LOGITS, lambda step: (logits[: step.batch.logit_rows_N.shape[0]],)))
    # Last, since the program's order is that of steps without adapters and hooks: what has nothing between it is run as one.
    for at, op in enumerate(found):
        layer = m.spec.layers[op.layer]
        if op.seam is Seam.GATE and layer.experts is None:
            found[at], found[at + 1] = _mlp_apart(m, native, op, layer)
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
    return (
        native.call(native.program.embed(table.weight, m.spec.embedding_scale, hidden.data_ptr(), hidden.stride(0))),
    )


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


def _inner(m: Material, layer: LayerSpec) -> tuple[Tensor, Tensor]:
    """Gates and what they open, [T, 2 I], and what comes of both, [T, I]: of one memory, whatever the layer's inner width."""
    inner, rows = layer.intermediate, m.buffers["gated"].shape[0]
    both, gated = m.buffers["gate_up"].flatten(), m.buffers["gated"].flatten()
    return both[: rows * 2 * inner].view(rows, 2 * inner), gated[: rows * inner].view(rows, inner)


def _mlp(m: Material, native: Native, index: int, layer: LayerSpec) -> list[Operation]:
    both, gated = _inner(m, layer)
    x, norm = _normed(m, native, index, m.weight(layer, "norm_mlp"))
    whole = native.mlp(m, x, layer, both, gated, m.buffers["projected"])
    seen = lambda step: (gated[: step.rows],)
    return [*norm, Operation(index, (), Seam.GATE, seen, through=(whole,)), Operation(index, ())]


def _mlp_apart(m: Material, native: Native, op: Operation, layer: LayerSpec) -> tuple[Operation, Operation]:
    """The same as two operations: where a hook stands between them, or adapters add to the first before gates open anything."""
    both, gated = _inner(m, layer)
    x = m.buffers["hidden" if m.weight(layer, "norm_mlp") is None else "normed"]
    weight: Any = m.weight(layer, "gate_up")
    up = native.gated_linear(m, x, weight, m.weight(layer, "gate_up_bias"), both, gated, layer.activation)
    down = _product(m, native, op.layer, gated, layer, "down", m.buffers["projected"])
    added = _product(m, native, op.layer, x, layer, "gate_up", both).adapted
    assert added is not None
    inner, activation = layer.intermediate, ACTIVATIONS[layer.activation]
    activate = native.program.gated(
        both.data_ptr(), both.stride(0), gated.data_ptr(), gated.stride(0), inner, activation
    )
    return replace(op, runs=(up,), adapted=(*added, native.call(activate))), down


def _experts(m: Material, native: Native, index: int, layer: LayerSpec) -> list[Operation]:
    program, buffers, width, experts = native.program, m.buffers, m.spec.width, layer.experts
    assert experts is not None
    num, each, rows = experts.num, experts.top_k, buffers["router"].shape[0]
    router = buffers["router"].flatten()[: rows * num].view(rows, num)
    shares = buffers["shares"][: rows * each].view(rows, each)
    ids = buffers["ids"].view(torch.int64)[: rows * each].view(rows, each)
    gate_up, gated = (buffers[name].data_ptr() for name in ("pair_gate_up", "pair_gated"))
    outputs = buffers["pair_outputs"].data_ptr()
    x, norm = _normed(m, native, index, m.weight(layer, "norm_mlp"))
    product = native.linear(m, x, m.weight(layer, "router"), None, router)
    mixture = native.module.Experts(
        router.data_ptr(), num, shares.data_ptr(), ids.data_ptr(), x.data_ptr(), x.stride(0), buffers["projected"].data_ptr(),
        width, outputs, width, num, each, experts.normalize,
    )  # fmt: skip
    up, down = ([part.weight for part in m.weight(layer, f"experts_{name}").parts] for name in ("gate_up", "down"))
    routed = native.call(program.route(mixture))
    runs = (
        native.call(program.experts(mixture, up, down, gate_up, gated, ACTIVATIONS[layer.activation], native.inputs)),
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
