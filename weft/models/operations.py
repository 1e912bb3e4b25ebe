"""A decoder as a flat list of operations over named buffers, and the seams at which the list may be cut.

Legend.  T: rows of the batch.  N: rows whose logits are wanted.  H: heads.  KV: kv heads.  D: head_dim.
I: inner size of the MLP.  k: experts per row.

    embed | for each layer: norm qkv rope | write attend | out add norm gate | down add | norm head softcap
          inputs                         qkv            attention          gate        output            logits

The words below the line are the seams, a closed list.  After the products qkv, out, gate_up and down an adapter may add what it
has for some of the rows; batches without adapters run a list in which nothing asks for one.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.errors import ConfigError
from weft.exec.batch import Batch
from weft.exec.kvpool import KVPool
from weft.models.spec import DecoderSpec, LayerSpec, RopeSpec
from weft.ops import Ops
from weft.ops.attention_call import AttentionCall
from weft.ops.ref.basic import Slabs
from weft.slots import Attention
from weft.types import GroupSpec

if TYPE_CHECKING:
    from weft.models.native_step import NativeStep


class Seam(enum.StrEnum):
    """Where a hook may stand, and the tensors that it gets (views of the buffers, to read or to write).

    INPUTS      hidden [T, width]: the inputs of the first layer; layer 0
    QKV         q [T, H, D], k [T, KV, D], v [T, KV, D], after norm and rope, before k and v are stored
    ATTENTION   attended [T, H, D], before the output projection
    GATE        dense: gated [T, I], before the down projection; experts: weights [T, k] and ids [T, k] of the chosen
    OUTPUT      hidden [T, width], after the layer
    LOGITS      logits [N, vocab], float32, after the soft cap; the last layer
    """

    INPUTS = "inputs"
    QKV = "qkv"
    ATTENTION = "attention"
    GATE = "gate"
    OUTPUT = "output"
    LOGITS = "logits"


Hook = Callable[[Batch, tuple[Tensor, ...]], None]
Weighing = Callable[[Tensor, int, float, float | None], Tensor]


@dataclass(slots=True)
class Step:
    """What the operations of one forward pass share.

    attending, stored: by the model's group, who computes attention with which plan, and the rows of memory that take the batch's
    keys.
    weighing: by the model's group, what sums attention by entry: queries, layer, scale, soft cap to float64 [sums, KV, entries].
    routed: weights and ids of the experts that the present layer chose.
    keep: rows whose keys and values are stored, where not all are.
    native: the step as the kernels know it, in a decoder that runs on them.  dense: whether they compute the attention of
    sequences without a technique in that slot.  alone: whether there are no others.
    span: the layers that it was made for.  encoded: vectors that the pool's store takes in.
    """

    batch: Batch
    pool: KVPool
    rows: int
    ropes: dict[RopeSpec, tuple[Tensor, Tensor]]
    attending: dict[int, list[tuple[Attention, AttentionCall, Any]]] = field(default_factory=dict)
    stored: dict[int, Tensor] = field(default_factory=dict)
    weighing: dict[int, Weighing] = field(default_factory=dict)
    routed: tuple[Tensor, Tensor] | None = None
    keep: Tensor | None = None
    native: NativeStep | None = None
    dense: bool = False
    alone: bool = False
    span: tuple[int, int] = (0, 0)
    encoded: int = 0

    def again(self, batch: Batch, pool: KVPool, span: tuple[int, int]) -> bool:
        """Take in the numbers of a batch that stands (`Batch.stands`); False where the step cannot be used for it."""
        if batch is not self.batch or pool is not self.pool or span != self.span or batch.mass is not None:
            return False
        if self.native is None or not self.native.again():
            return False
        self.encode()
        return True

    def encode(self) -> None:
        """Tell the pool's store what it takes in."""
        if self.encoded and self.pool.store is not None:
            self.pool.store.encoded(self.encoded)


Run = Callable[[Step], None]
Cut = Callable[[int], Slabs]


@dataclass(frozen=True, slots=True)
class Operation:
    """One entry of the flat list.  `seam` stands after it; `views` gives the tensors that a hook there gets.

    runs: what it consists of.
    adapted: what runs in its place where the batch has adapters.
    dense: what runs in its place where the kernels compute attention.  others: what runs after that for sequences whose
    attention a technique computes, or is summed up.
    through: what runs in place of this operation and the next, where no hook stands between them and the batch has no adapters.
    vectors: what runs after it where the batch has vectors in the place of tokens.
    """

    layer: int
    runs: tuple[Run, ...]
    seam: Seam | None = None
    views: Callable[[Step], tuple[Tensor, ...]] | None = None
    adapted: tuple[Run, ...] | None = None
    dense: tuple[Run, ...] | None = None
    others: tuple[Run, ...] = ()
    through: tuple[Run, ...] | None = None
    vectors: tuple[Run, ...] = ()

    def chosen(self, hooked: bool, adapted: bool, dense: bool) -> tuple[Run, ...]:
        """What it consists of in such a step; hooked: whether a hook stands after it."""
        if self.through is not None and not (hooked or adapted):
            return self.through
        if adapted and self.adapted is not None:
            return self.adapted
        return self.dense if dense and self.dense is not None else self.runs


@dataclass(frozen=True, slots=True)
class Material:
    """What the operations are made of.

    tensors: weights by name (`layout.tensor_shapes`).  buffers: by name (`layout.buffer_shapes`).
    groups: the model's KV groups.  group_of: the one of each layer.  dtype: of weights and KV.
    cut: how rows are cut into products with the given weights, for any number of rows.
    """

    spec: DecoderSpec
    ops: Ops
    tensors: Mapping[str, Any]
    buffers: Mapping[str, Tensor]
    groups: Sequence[GroupSpec]
    group_of: Mapping[int, int]
    dtype: torch.dtype
    cut: Callable[..., Cut]

    def weight(self, layer: LayerSpec, name: str) -> Any:
        """A layer's weight, or None where the layer has none of that name."""
        return self.tensors.get(f"{layer.weights}.{name}")


def operations(m: Material) -> list[Operation]:
    """The whole list.  Raises ConfigError for a layer that no operation computes."""
    hidden, logits = m.buffers["hidden"], m.buffers["logits"]
    last = len(m.spec.layers) - 1
    found = [Operation(0, (_embed(m),), Seam.INPUTS, lambda step: (hidden[: step.rows],), vectors=(vectors(m),))]
    for index, layer in enumerate(m.spec.layers):
        if layer.attention != "softmax":
            raise ConfigError(f"layer {index} asks for {layer.attention} attention, which weft can't run yet")
        found += _attention(m, index, layer)
        found += _experts(m, index, layer) if layer.experts else _mlp(m, index, layer)
        output = (_add(m, layer, "norm_mlp_out"),)
        found.append(Operation(index, output, Seam.OUTPUT, lambda step: (hidden[: step.rows],)))
    found.append(
        Operation(last, (_logits(m),), Seam.LOGITS, lambda step: (logits[: step.batch.logit_rows_N.shape[0]],))
    )
    return found


def _embed(m: Material) -> Run:
    def run(step: Step) -> None:
        out = m.buffers["hidden"][: step.rows]
        m.ops.embed(step.batch.tokens_T, m.tensors["embed"], m.spec.embedding_scale, out)

    return run


def vectors(m: Material) -> Run:
    """Vectors in the place of embeddings, for a batch that has some."""

    def run(step: Step) -> None:
        assert step.batch.vectors is not None
        rows, values = step.batch.vectors
        out = m.buffers["hidden"][: step.rows]
        out.index_copy_(0, rows, values.to(out.dtype))

    return run


def _norm(m: Material, source: str, weight: Tensor | None, target: str) -> Run:
    """Normalize rows of one buffer into another; without a weight, copy them."""
    x, out = m.buffers[source], m.buffers[target]
    norm, eps, offset = m.ops.rms_norm, m.spec.norm_eps, m.spec.norm_offset

    def run(step: Step) -> None:
        if weight is None:
            out[: step.rows].copy_(x[: step.rows])
        else:
            norm(x[: step.rows], weight, eps, offset, out[: step.rows])

    return run


def _linear(m: Material, x: Tensor, layer: LayerSpec, name: str, out: Tensor) -> Run:
    linear, weight, bias = m.ops.linear, m.weight(layer, name), m.weight(layer, f"{name}_bias")
    cut = m.cut(weight)
    return lambda step: linear(x, weight, bias, out, cut(step.rows))


def _product(m: Material, index: int, x: Tensor, layer: LayerSpec, name: str, out: Tensor) -> Operation:
    """A product that adapters may change."""
    multiply = _linear(m, x, layer, name, out)

    def adapted(step: Step) -> None:
        multiply(step)
        deltas = step.batch.deltas
        assert deltas is not None
        deltas.add(layer.weights, name, x, out)

    return Operation(index, (multiply,), adapted=(adapted,))


def _add(m: Material, layer: LayerSpec, norm: str) -> Run:
    """Add what attention or MLP projected to the stream, normalized first where the layer has a norm there."""
    hidden, projected = m.buffers["hidden"], m.buffers["projected"]
    weight = m.weight(layer, norm)
    normalize = _norm(m, "projected", weight, "projected") if weight is not None else None

    def run(step: Step) -> None:
        if normalize is not None:
            normalize(step)
        hidden[: step.rows] += projected[: step.rows]

    return run


def _attention(m: Material, index: int, layer: LayerSpec) -> list[Operation]:
    spec, ops, qkv = m.spec, m.ops, m.buffers["qkv"]
    heads, kv_heads, dim = spec.heads, spec.kv_heads, spec.head_dim
    split = qkv.view(qkv.shape[0], heads + 2 * kv_heads, dim)
    rotary, q, k, v = split[:, : heads + kv_heads], split[:, :heads], split[:, heads:-kv_heads], split[:, -kv_heads:]
    attended = m.buffers["attended"].view(-1, heads, dim)
    q_norm, k_norm = m.weight(layer, "q_norm"), m.weight(layer, "k_norm")

    def turn(step: Step) -> None:
        rows = slice(0, step.rows)
        if q_norm is not None:
            ops.rms_norm(q[rows], q_norm, spec.norm_eps, spec.norm_offset, q[rows])
            ops.rms_norm(k[rows], k_norm, spec.norm_eps, spec.norm_offset, k[rows])
        if layer.rope is not None:
            ops.apply_rope(rotary[rows], *step.ropes[layer.rope])

    views = (q, k, v)
    return [
        Operation(index, (_norm(m, "hidden", m.weight(layer, "norm_attention"), "normed"),)),
        _product(m, index, m.buffers["normed"], layer, "qkv", qkv),
        Operation(index, (turn,), Seam.QKV, lambda step: tuple(view[: step.rows] for view in views)),
        Operation(index, (store(m, index, k, v),)),
        Operation(
            index, (attend(m, index, layer, q, attended),), Seam.ATTENTION, lambda step: (attended[: step.rows],)
        ),
        _product(m, index, m.buffers["attended"], layer, "out", m.buffers["projected"]),
        Operation(index, (_add(m, layer, "norm_attention_out"),)),
        Operation(index, (_norm(m, "hidden", m.weight(layer, "norm_mlp"), "normed"),)),
    ]


def store(m: Material, index: int, k: Tensor, v: Tensor) -> Run:
    """Stores keys and values [max rows, kv heads, D] of a layer, as the pool has them."""
    group = m.group_of[index]

    def run(step: Step) -> None:
        at, rows, keys, values = step.attending[group][0][1].group, step.stored[group], k[: step.rows], v[: step.rows]
        if step.keep is not None:
            rows, keys, values = rows[step.keep], keys[step.keep], values[step.keep]
        step.pool.write_rows(at, index, rows, keys, values)

    return run


def attend(m: Material, index: int, layer: LayerSpec, q: Tensor, attended: Tensor) -> Run:
    """Attention of a layer, each sequence's by the technique of its stack: from q to attended, [max rows, H, D]."""
    group = m.group_of[index]

    def run(step: Step) -> None:
        for technique, call, plan in step.attending[group]:
            call.layer, call.q_THD, call.out_THD = index, q[: step.rows], attended
            call.scale, call.softcap = layer.query_scale, layer.attention_softcap
            technique.run(call, plan)
        mass = step.batch.mass
        if mass is not None and group in step.weighing:
            found = step.weighing[group](q[: step.rows], index, layer.query_scale, layer.attention_softcap)
            mass.found[index] = found

    return run


def _mlp(m: Material, index: int, layer: LayerSpec) -> list[Operation]:
    inner, activation = layer.intermediate, layer.activation
    # Layers of different inner sizes share one buffer, each with a dense shape of its own.
    rows = m.buffers["gated"].shape[0]
    gated = m.buffers["gated"].flatten()[: rows * inner].view(rows, inner)
    gate_up = m.buffers["gate_up"].flatten()[: rows * 2 * inner].view(rows, 2 * inner)

    def gate(step: Step) -> None:
        m.ops.gated(gate_up[: step.rows], activation, gated[: step.rows])

    return [
        _product(m, index, m.buffers["normed"], layer, "gate_up", gate_up),
        Operation(index, (gate,), Seam.GATE, lambda step: (gated[: step.rows],)),
        _product(m, index, gated, layer, "down", m.buffers["projected"]),
    ]


def filling(m: Material, index: int, cut: Cut) -> Callable[[Step, int], None]:
    """Keys and values of one layer out of the rows in the buffer `hidden`, stored in the given group of the pool; nothing else.

    cut: of the product, which is that part of the layer's `qkv` alone, a fraction of the layer.
    """
    spec, ops, layer, group = m.spec, m.ops, m.spec.layers[index], m.group_of[index]
    first, wide = spec.heads * spec.head_dim, 2 * spec.kv_heads * spec.head_dim
    fused, fused_bias = m.weight(layer, "qkv"), m.weight(layer, "qkv_bias")
    assert fused is not None
    weight, bias = fused[first:], None if fused_bias is None else fused_bias[first:]
    normed, rows = m.buffers["normed"], m.buffers["qkv"].shape[0]
    out = m.buffers["qkv"].flatten()[: rows * wide].view(rows, wide)
    split = out.view(rows, 2 * spec.kv_heads, spec.head_dim)
    k, v = split[:, : spec.kv_heads], split[:, spec.kv_heads :]
    k_norm, norm = m.weight(layer, "k_norm"), _norm(m, "hidden", m.weight(layer, "norm_attention"), "normed")

    def run(step: Step, at: int) -> None:
        norm(step)
        ops.linear(normed, weight, bias, out, cut(step.rows))
        if step.batch.deltas is not None:
            step.batch.deltas.add(layer.weights, "qkv", normed, out, first)
        keys = k[: step.rows]
        if k_norm is not None:
            ops.rms_norm(keys, k_norm, spec.norm_eps, spec.norm_offset, keys)
        if layer.rope is not None:
            ops.apply_rope(keys, *step.ropes[layer.rope])
        step.pool.write_rows(at, index, step.stored[group], keys, v[: step.rows])

    return run


def _experts(m: Material, index: int, layer: LayerSpec) -> list[Operation]:
    experts = layer.experts
    assert experts is not None
    rows = m.buffers["router"].shape[0]
    router = m.buffers["router"].flatten()[: rows * experts.num].view(rows, experts.num)
    gate_up, down = m.weight(layer, "experts_gate_up"), m.weight(layer, "experts_down")
    cut = m.cut(gate_up, down)

    def route(step: Step) -> None:
        step.routed = m.ops.route(router[: step.rows], experts.top_k, experts.normalize)

    def views(step: Step) -> tuple[Tensor, ...]:
        assert step.routed is not None
        return step.routed

    def mix(step: Step) -> None:
        assert step.routed is not None
        x, out = m.buffers["normed"][: step.rows], m.buffers["projected"][: step.rows]
        m.ops.experts(x, *step.routed, gate_up, down, layer.activation, out, cut)

    return [
        Operation(index, (_linear(m, m.buffers["normed"], layer, "router", router),)),
        Operation(index, (route,), Seam.GATE, views),
        Operation(index, (mix,)),
    ]


def _logits(m: Material) -> Run:
    picked, finish = m.buffers["picked"], head(m)

    def run(step: Step) -> None:
        count = step.batch.logit_rows_N.shape[0]
        if count:
            torch.index_select(m.buffers["hidden"], 0, step.batch.logit_rows_N, out=picked[:count])
            finish(count)

    return run


def head(m: Material) -> Callable[[int], None]:
    """From the first rows of the buffer `picked`, which are hidden states, to as many rows of logits."""
    picked, logits, narrow = m.buffers["picked"], m.buffers["logits"], m.buffers.get("narrow_logits")
    head = m.tensors["embed" if m.spec.tied else "head"]
    spec, norm, cut = m.spec, m.tensors["norm"], m.cut(head)

    def run(count: int) -> None:
        mine = picked[:count]
        m.ops.rms_norm(mine, norm, spec.norm_eps, spec.norm_offset, mine)
        m.ops.linear(picked, head, None, logits if narrow is None else narrow, cut(count))
        if narrow is not None:
            logits[:count].copy_(narrow[:count])
        if spec.final_softcap is not None:
            m.ops.softcap_(logits[:count], spec.final_softcap)

    return run
