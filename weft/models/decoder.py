"""One decoder for every spec: a flat list of operations over named buffers, cut at seams only where something hooks in.

Legend.  T: rows of the batch.  N: rows whose logits are wanted.  H: heads.  KV: kv heads.  D: head_dim.  I: inner size of the MLP.

    embed | for each layer: norm qkv rope | write attend | out add norm gate | down add | norm head softcap
          inputs                         qkv            attention          gate        output            logits

The words below the line are the seams, a closed list.  Without hooks the whole list is one segment.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from weft import ops as operations
from weft.errors import ConfigError
from weft.exec.batch import Batch
from weft.exec.kvpool import KVPool
from weft.models.layout import arena, buffer_shapes, tensor_shapes, workspace_bytes
from weft.models.spec import DTYPE_BYTES, DecoderSpec, LayerSpec, RopeSpec, dtype_bytes
from weft.models.weights import Progress, allocate, load, randomize
from weft.ops.ref.attention_plan import AttentionPlan
from weft.ops.ref.basic import Slabs
from weft.ops.ref.rope import frequencies
from weft.ops.ref.tiles import FAST, Tiling, agreeing_rows, invariant_tiling, slabs_for, whole
from weft.types import GroupKind, GroupSpec

__all__ = ["Decoder", "Seam", "build", "workspace_bytes"]


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


@dataclass(slots=True)
class Step:
    """What the operations of one forward pass share."""

    batch: Batch
    pool: KVPool
    rows: int
    slabs: Slabs
    ropes: dict[RopeSpec, tuple[Tensor, Tensor]]
    plans: dict[int, AttentionPlan] = field(default_factory=dict)
    stored: dict[int, Tensor] = field(default_factory=dict)
    routed: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """One entry of the flat list.  `seam` stands after it; `views` gives the tensors that a hook there gets."""

    layer: int
    run: Callable[[Step], None]
    seam: Seam | None = None
    views: Callable[[Step], tuple[Tensor, ...]] | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """Operations that run without a break, and the hook that follows them."""

    runs: tuple[Callable[[Step], None], ...]
    last: Operation
    hook: Hook | None


class Decoder:
    """A model ready to run.  Built by `build`; see there for the arguments."""

    def __init__(
        self,
        spec: DecoderSpec,
        memory: Tensor,
        tensors: dict[str, Tensor],
        *,
        max_rows: int,
        max_samples: int,
        groups: Sequence[GroupSpec],
        invariant: bool,
        ops: operations.Ops,
    ) -> None:
        self.spec = spec
        self.tensors = tensors
        self.dtype = tensors["embed"].dtype
        self.device = memory.device
        self.max_rows, self.max_samples = max_rows, max_samples
        self.groups = tuple(groups)
        self.invariant = invariant
        self.ops = ops
        self._weights = memory
        self._buffers, self._workspace = self._allocate()
        self._group_of = _group_of_layers(spec, groups)
        self._inverse = {layer.rope: frequencies(layer.rope).to(self.device) for layer in spec.layers if layer.rope}
        self._slabs, self._head_slabs, self._tiling = self._cuts()
        self._operations = self._list()
        self._hooks: dict[tuple[Seam, int], list[Hook]] = {}
        self._segments: dict[tuple[int, int], list[Segment]] = {}

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights."""
        return self._weights.nbytes

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the named buffers."""
        return self._workspace.nbytes

    def _allocate(self) -> tuple[dict[str, Tensor], Tensor]:
        name = str(self.dtype).removeprefix("torch.")
        shapes = buffer_shapes(self.spec, name, self.max_rows, self.max_samples)
        offsets, total = arena({key: (shape, DTYPE_BYTES[kind]) for key, (shape, kind) in shapes.items()})
        memory = torch.zeros(total, dtype=torch.uint8, device=self.device)
        buffers = {}
        for key, (shape, kind) in shapes.items():
            stop = offsets[key] + math.prod(shape) * DTYPE_BYTES[kind]
            buffers[key] = memory[offsets[key] : stop].view(getattr(torch, kind)).view(shape)
        return buffers, memory

    def _cuts(self) -> tuple[Callable[[int], Slabs], Callable[[int], Slabs], Tiling]:
        """How rows are cut into products, and attention into tiles."""
        if not self.invariant:
            return whole, whole, FAST
        by_shape: dict[tuple[int, ...], Tensor] = {}
        for name, tensor in self.tensors.items():
            if tensor.dim() > 1 and name not in ("embed", "head"):
                by_shape.setdefault(tensor.shape[-2:], tensor if tensor.dim() == 2 else tensor[0])
        rows = slabs_for(agreeing_rows(by_shape.values()))
        head = slabs_for(agreeing_rows([self.tensors["embed" if self.spec.tied else "head"]]))
        tiling = invariant_tiling(self.spec.heads // self.spec.kv_heads, self.spec.head_dim, self.device)
        return rows, head, tiling

    # ------------------------------------------------------------------------------------------ running

    def forward(
        self, batch: Batch, pool: KVPool, layers: tuple[int, int] | None = None, hidden: Tensor | None = None
    ) -> Tensor:
        """Run the batch through `layers` (first, stop), all of them by default.

        From layer 0 on the rows are embedded; from a later layer on, `hidden` [T, width] is what came out of the one before.
        Returns logits [N, vocab], float32, of batch.logit_rows_N when the last layer is among them, otherwise hidden
        [T, width].  Both are views of buffers that the next call overwrites.  Stores the rows' K, V and positions.
        """
        first, stop = layers or (0, len(self.spec.layers))
        rows = batch.tokens_T.shape[0]
        assert rows <= self.max_rows, f"{rows} rows in a decoder built for {self.max_rows}"
        assert 0 <= first < stop <= len(self.spec.layers) and (first == 0) == (hidden is None)
        at_end = stop == len(self.spec.layers)
        wanted = batch.logit_rows_N.shape[0] if at_end else 0
        assert wanted <= self.max_samples, f"{wanted} rows of logits in a decoder built for {self.max_samples}"
        if rows:
            if self.device.type == "cpu":
                assert int(batch.positions_T.max()) < self.spec.max_positions, "a position beyond the model's context"
            if hidden is not None:
                self._buffers["hidden"][:rows].copy_(hidden)
            step = self._begin(batch, pool, rows, first, stop)
            for segment in self._cut(first, stop):
                for run in segment.runs:
                    run(step)
                if segment.hook is not None:
                    assert segment.last.views is not None
                    segment.hook(batch, segment.last.views(step))
        return self._buffers["logits"][:wanted] if at_end else self._buffers["hidden"][:rows]

    def _begin(self, batch: Batch, pool: KVPool, rows: int, first: int, stop: int) -> Step:
        """Store positions and work out what every layer needs: slots as rows of memory, rope tables, attention tiles."""
        ropes = {
            rope: self.ops.rope_tables(batch.positions_T, inverse, rope.attention_factor)
            for rope, inverse in self._inverse.items()
        }
        step = Step(batch, pool, rows, self._slabs(rows), ropes)
        for group in sorted({self._group_of[layer] for layer in range(first, stop)}):
            where, at = batch.groups[group], pool.groups.index(self.groups[group])
            pool.write_positions(at, where.slots_T, batch.positions_T)
            step.stored[group] = pool.row_of(at, *pool.split(at, where.slots_T))
            step.plans[group] = AttentionPlan(batch, where, pool, at, self.spec.heads, self._tiling)
        return step

    # ------------------------------------------------------------------------------------------ seams

    def hook(self, seam: Seam, layer: int, fn: Hook) -> Callable[[], None]:
        """Call `fn(batch, tensors)` at the seam of the layer, in every pass that reaches it; returns a call that removes it.

        layer: 0 for INPUTS, the last for LOGITS.  Raises ConfigError when there is no such seam.
        """
        seam = Seam(seam)
        if not any(op.seam is seam and op.layer == layer for op in self._operations):
            raise ConfigError(f"there is no seam {seam} at layer {layer} of {len(self.spec.layers)}")
        self._hooks.setdefault((seam, layer), []).append(fn)
        self._segments.clear()

        def remove() -> None:
            self._hooks[seam, layer].remove(fn)
            self._segments.clear()

        return remove

    def _cut(self, first: int, stop: int) -> list[Segment]:
        """The operations of a range of layers as segments, cut at hooked seams and nowhere else."""
        if (first, stop) in self._segments:
            return self._segments[first, stop]
        chosen = [op for op in self._operations if first <= op.layer < stop and not (op.seam is Seam.INPUTS and first)]
        segments: list[Segment] = []
        runs: list[Callable[[Step], None]] = []
        for op in chosen:
            runs.append(op.run)
            hooks = self._hooks.get((op.seam, op.layer), []) if op.seam is not None else []
            for hook in hooks:
                segments.append(Segment(tuple(runs), op, hook))
                runs = []
        if runs:
            segments.append(Segment(tuple(runs), chosen[-1], None))
        self._segments[first, stop] = segments
        return segments

    @property
    def segments(self) -> int:
        """Segments of a whole pass: 1 where nothing hooks in."""
        return len(self._cut(0, len(self.spec.layers)))

    # ------------------------------------------------------------------------------------------ the list

    def _list(self) -> list[Operation]:
        found = [Operation(0, self._embed, Seam.INPUTS, lambda s: (self._buffers["hidden"][: s.rows],))]
        for index, layer in enumerate(self.spec.layers):
            if layer.attention != "softmax":
                raise ConfigError(f"layer {index} asks for {layer.attention} attention, which weft can't run yet")
            found += self._attention_operations(index, layer)
            found += self._expert_operations(index, layer) if layer.experts else self._mlp_operations(index, layer)
        last = len(self.spec.layers) - 1
        logits = self._buffers["logits"]
        found.append(
            Operation(last, self._logits, Seam.LOGITS, lambda s: (logits[: s.batch.logit_rows_N.shape[0]],))
        )
        return found

    def _weight(self, layer: LayerSpec, name: str) -> Tensor | None:
        return self.tensors.get(f"{layer.weights}.{name}")

    def _embed(self, step: Step) -> None:
        out = self._buffers["hidden"][: step.rows]
        self.ops.embed(step.batch.tokens_T, self.tensors["embed"], self.spec.embedding_scale, out)
        if step.batch.vectors is not None:
            rows, values = step.batch.vectors
            out.index_copy_(0, rows, values.to(out.dtype))

    def _norm(self, source: str, weight: Tensor | None, target: str) -> Callable[[Step], None]:
        """Normalize rows of one buffer into another; without a weight, copy them."""
        x, out = self._buffers[source], self._buffers[target]
        norm, eps, offset = self.ops.rms_norm, self.spec.norm_eps, self.spec.norm_offset

        def run(step: Step) -> None:
            if weight is None:
                out[: step.rows].copy_(x[: step.rows])
            else:
                norm(x[: step.rows], weight, eps, offset, out[: step.rows])

        return run

    def _linear(self, source: str, layer: LayerSpec, name: str, target: Tensor) -> Callable[[Step], None]:
        x, linear = self._buffers[source], self.ops.linear
        weight, bias = self._weight(layer, name), self._weight(layer, f"{name}_bias")
        return lambda step: linear(x, weight, bias, target, step.slabs)

    def _add(self, layer: LayerSpec, norm: str) -> Callable[[Step], None]:
        """Add what attention or MLP projected to the stream, normalized first where the layer has a norm there."""
        hidden, projected = self._buffers["hidden"], self._buffers["projected"]
        weight = self._weight(layer, norm)
        normalize = self._norm("projected", weight, "projected") if weight is not None else None

        def run(step: Step) -> None:
            if normalize is not None:
                normalize(step)
            hidden[: step.rows] += projected[: step.rows]

        return run

    def _attention_operations(self, index: int, layer: LayerSpec) -> list[Operation]:
        spec, buffers, ops = self.spec, self._buffers, self.ops
        heads, kv_heads, dim = spec.heads, spec.kv_heads, spec.head_dim
        group = self._group_of[index]
        rotary = buffers["qkv"][:, : (heads + kv_heads) * dim].unflatten(1, (heads + kv_heads, dim))
        q, k = rotary[:, :heads], rotary[:, heads:]
        v = buffers["qkv"][:, (heads + kv_heads) * dim :].unflatten(1, (kv_heads, dim))
        attended = buffers["attended"].unflatten(1, (heads, dim))
        q_norm, k_norm = self._weight(layer, "q_norm"), self._weight(layer, "k_norm")

        def turn(step: Step) -> None:
            rows = slice(0, step.rows)
            if q_norm is not None:
                ops.rms_norm(q[rows], q_norm, spec.norm_eps, spec.norm_offset, q[rows])
                ops.rms_norm(k[rows], k_norm, spec.norm_eps, spec.norm_offset, k[rows])
            if layer.rope is not None:
                ops.apply_rope(rotary[rows], *step.ropes[layer.rope])

        def store(step: Step) -> None:
            at = step.plans[group].group
            step.pool.write_rows(at, index, step.stored[group], k[: step.rows], v[: step.rows])

        def attend(step: Step) -> None:
            ops.attention(
                q[: step.rows],
                step.pool,
                index,
                step.plans[group],
                scale=layer.query_scale,
                softcap=layer.attention_softcap,
                out_THD=attended,
            )

        views = (q, k, v)
        return [
            Operation(index, self._norm("hidden", self._weight(layer, "norm_attention"), "normed")),
            Operation(index, self._linear("normed", layer, "qkv", buffers["qkv"])),
            Operation(index, turn, Seam.QKV, lambda step: tuple(view[: step.rows] for view in views)),
            Operation(index, store),
            Operation(index, attend, Seam.ATTENTION, lambda step: (attended[: step.rows],)),
            Operation(index, self._linear("attended", layer, "out", buffers["projected"])),
            Operation(index, self._add(layer, "norm_attention_out")),
            Operation(index, self._norm("hidden", self._weight(layer, "norm_mlp"), "normed")),
        ]

    def _mlp_operations(self, index: int, layer: LayerSpec) -> list[Operation]:
        buffers, inner, activation = self._buffers, layer.intermediate, layer.activation
        # Layers of different inner sizes share one buffer, each with its own dense shape.
        rows = buffers["gated"].shape[0]
        gated = buffers["gated"].flatten()[: rows * inner].view(rows, inner)
        gate_up = buffers["gate_up"].flatten()[: rows * 2 * inner].view(rows, 2 * inner)
        down, bias = self._weight(layer, "down"), self._weight(layer, "down_bias")

        def gate(step: Step) -> None:
            self.ops.gated(gate_up[: step.rows], activation, gated[: step.rows])

        def project(step: Step) -> None:
            self.ops.linear(gated, down, bias, buffers["projected"], step.slabs)

        return [
            Operation(index, self._linear("normed", layer, "gate_up", gate_up)),
            Operation(index, gate, Seam.GATE, lambda step: (gated[: step.rows],)),
            Operation(index, project),
            self._output(index, layer),
        ]

    def _expert_operations(self, index: int, layer: LayerSpec) -> list[Operation]:
        buffers, experts = self._buffers, layer.experts
        assert experts is not None
        rows = buffers["router"].shape[0]
        router = buffers["router"].flatten()[: rows * experts.num].view(rows, experts.num)
        gate_up, down = self._weight(layer, "experts_gate_up"), self._weight(layer, "experts_down")

        def route(step: Step) -> None:
            step.routed = self.ops.route(router[: step.rows], experts.top_k, experts.normalize)

        def views(step: Step) -> tuple[Tensor, ...]:
            assert step.routed is not None
            return step.routed

        def mix(step: Step) -> None:
            assert step.routed is not None
            x, out = buffers["normed"][: step.rows], buffers["projected"][: step.rows]
            self.ops.experts(x, *step.routed, gate_up, down, layer.activation, out, self._expert_slabs)

        return [
            Operation(index, self._linear("normed", layer, "router", router)),
            Operation(index, route, Seam.GATE, views),
            Operation(index, mix),
            self._output(index, layer),
        ]

    def _expert_slabs(self, rows: int) -> Slabs:
        return self._slabs(rows)

    def _output(self, index: int, layer: LayerSpec) -> Operation:
        hidden = self._buffers["hidden"]
        return Operation(index, self._add(layer, "norm_mlp_out"), Seam.OUTPUT, lambda step: (hidden[: step.rows],))

    def _logits(self, step: Step) -> None:
        wanted = step.batch.logit_rows_N
        count = wanted.shape[0]
        if not count:
            return
        picked, logits = self._buffers["picked"], self._buffers["logits"]
        torch.index_select(self._buffers["hidden"], 0, wanted, out=picked[:count])
        self.ops.rms_norm(picked[:count], self.tensors["norm"], self.spec.norm_eps, self.spec.norm_offset, picked[:count])
        head = self.tensors["embed" if self.spec.tied else "head"]
        narrow = self._buffers.get("narrow_logits")
        self.ops.linear(picked, head, None, logits if narrow is None else narrow, self._head_slabs(count))
        if narrow is not None:
            logits[:count].copy_(narrow[:count])
        if self.spec.final_softcap is not None:
            self.ops.softcap_(logits[:count], self.spec.final_softcap)


def _group_of_layers(spec: DecoderSpec, groups: Sequence[GroupSpec]) -> dict[int, int]:
    """The group that holds each layer's keys and values."""
    found: dict[int, int] = {}
    for index, group in enumerate(groups):
        if group.kind in (GroupKind.FULL, GroupKind.WINDOW):
            found.update(dict.fromkeys(group.layers, index))
    for index, layer in enumerate(spec.layers):
        if index not in found or groups[found[index]].window != layer.window:
            raise ConfigError(f"no KV group with window {layer.window} holds layer {index}")
    return found


def build(
    spec: DecoderSpec,
    source: Path | Literal["random"],
    *,
    dtype: torch.dtype | str,
    device: torch.device | str = "cpu",
    max_rows: int,
    max_samples: int,
    groups: Sequence[GroupSpec],
    invariant: bool | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    ops: str = "ref",
) -> Decoder:
    """Allocate, load and get ready to run.

    source      a folder with safetensors, or "random" for noise drawn from `seed`
    dtype       number format of weights, activations and KV: float32, bfloat16 or float16
    max_rows, max_samples   most rows of a batch, and most rows whose logits it wants
    groups      the KV groups of the model, in the order of a batch's groups
    invariant   whether a row's bits may depend on nothing but its own context; by default on a CPU in float32
    progress    called with (bytes loaded, bytes in all)
    Raises ConfigError for a spec, dtype or checkpoint that cannot be used.
    """
    kind = getattr(torch, dtype) if isinstance(dtype, str) and dtype_bytes(dtype) else dtype
    assert isinstance(kind, torch.dtype)
    dtype_bytes(str(kind))
    place = torch.device(device)
    memory, tensors = allocate(spec, kind, place)
    assert tensors.keys() == tensor_shapes(spec).keys()
    if isinstance(source, str) and source == "random":
        randomize(spec, tensors, seed, progress)
    else:
        load(Path(source), spec, tensors, progress)
    if invariant is None:
        invariant = place.type == "cpu" and kind is torch.float32
    return Decoder(
        spec,
        memory,
        tensors,
        max_rows=max_rows,
        max_samples=max_samples,
        groups=groups,
        invariant=invariant,
        ops=operations.choose(ops),
    )
