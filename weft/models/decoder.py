"""One decoder for every spec: weights and buffers in memory, and a flat list of operations run over a batch.

The list (`operations.py`) is cut at seams where something hooks in, and nowhere else (`segments.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from weft.errors import ConfigError
from weft.exec.batch import Batch
from weft.exec.kvpool import KVPool
from weft.models import kernels as cpu
from weft.models.formats import WeightFormat
from weft.models.layout import arena, buffer_bytes, buffer_shapes, workspace_bytes
from weft.models.operations import Cut, Hook, Material, Seam, Step, Weighing, filling, head, operations
from weft.models.ropes import Ropes
from weft.models.segments import Segments
from weft.models.spec import PAD_ROWS, DecoderSpec, dtype_bytes, group_of_layers
from weft.models.weights import Progress, allocate, load, randomize
from weft.native import module as kernels
from weft.ops import Ops, choose
from weft.ops.attention_call import DENSE, AttentionCall, ByKernels, by_technique
from weft.ops.ref.attention_mass import WeighingPlan
from weft.ops.ref.tiles import (
    CANDIDATES,
    FAST,
    SMALL_ROWS,
    Tiling,
    agreeing_rows,
    invariant_tiling,
    slabs_for,
    whole,
)
from weft.types import GroupSpec

__all__ = ["Decoder", "Hook", "Seam", "build", "workspace_bytes"]


class Decoder:
    """A model ready to run.  Built by `build`; see there for the arguments."""

    def __init__(
        self,
        spec: DecoderSpec,
        memory: Tensor,
        tensors: dict[str, Any],
        *,
        max_rows: int,
        max_samples: int,
        groups: Sequence[GroupSpec],
        invariant: bool,
        ops: Ops,
        native: cpu.Native | None = None,
    ) -> None:
        self.spec = spec
        self.tensors = tensors
        self.native = native
        self.dtype: torch.dtype = tensors["norm"].dtype
        self.stream_dtype = self.dtype if native is None else torch.float32
        """Number format of activations."""
        self.device = memory.device
        self.max_rows, self.max_samples = max_rows, max_samples
        self.groups = tuple(groups)
        self.invariant = invariant
        self.ops = ops
        self.weights = memory
        self._buffers, self._workspace = self._allocate()
        self._group_of = group_of_layers(spec, groups)
        self._ropes = Ropes(spec, ops, self.device)
        self._logits: dict[int, Tensor] = {}
        self._stood: Step | None = None
        """The newest step in which the kernels do everything: what a batch that stands goes on with."""
        self._tiling = self._attention_tiling()
        self._cuts: dict[tuple[tuple[int, ...], ...], Cut] = {}
        self._material = Material(spec, ops, tensors, self._buffers, self.groups, self._group_of, self.dtype, self.cut)
        self._operations = operations(self._material) if native is None else cpu.operations(self._material, native)
        self._head = head(self._material) if native is None else None
        self._fillings: list[Callable[[Step, int], None]] = []
        self._segments = Segments(self._operations)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights."""
        return self.weights.nbytes

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the named buffers."""
        return self._workspace.nbytes

    def _allocate(self) -> tuple[dict[str, Tensor], Tensor]:
        name = str(self.stream_dtype).removeprefix("torch.")
        shapes = buffer_shapes(self.spec, name, self.max_rows, self.max_samples, self.native is not None)
        sizes = buffer_bytes(shapes)
        offsets, total = arena(sizes)
        memory = torch.zeros(total, dtype=torch.uint8, device=self.device)
        buffers = {}
        for key, (shape, kind) in shapes.items():
            buffers[key] = memory[offsets[key] : offsets[key] + sizes[key]].view(getattr(torch, kind)).view(shape)
        return buffers, memory

    def _attention_tiling(self) -> Tiling:
        if not self.invariant:
            return FAST
        return invariant_tiling(self.spec.heads // self.spec.kv_heads, self.spec.head_dim, self.device)

    def cut(self, *weights: Tensor) -> Cut:
        """How rows are cut into products with these weights ([N, K], or a stack of such); tried once for each shape."""
        if not self.invariant:
            return whole
        shapes = tuple(tuple(weight.shape[-2:]) for weight in weights)
        if shapes not in self._cuts:
            # Few rows want logits, and the head is the widest weight: its trials would cost the most and gain the least.
            most = PAD_ROWS if weights[0].shape[0] == self.spec.vocab else CANDIDATES[-1]
            matrices = [weight if weight.dim() == 2 else weight[0] for weight in weights]
            self._cuts[shapes] = slabs_for(agreeing_rows(matrices, most))
        return self._cuts[shapes]

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
        assert (first == 0) == (hidden is None)
        at_end = stop == len(self.spec.layers)
        wanted = batch.logit_rows_N.shape[0] if at_end else 0
        if rows:
            step = self.begin(batch, pool, first, stop)
            if hidden is not None:
                self._buffers["hidden"][:rows].copy_(hidden)
            self._segments.run(step, first, stop, at_end)
        return self._first_logits(wanted) if at_end else self._buffers["hidden"][:rows]

    def _first_logits(self, count: int) -> Tensor:
        """The first rows of the buffer of logits; to cut them out anew is dear behind a pass, which has filled the caches."""
        if count not in self._logits:
            self._logits[count] = self._buffers["logits"][:count]
        return self._logits[count]

    @property
    def program(self) -> Any:
        """What draws tokens by weft's kernels, where they compute this model, else None."""
        return None if self.native is None else self.native.drawing

    # ------------------------------------------------------------------------------------------ in stretches

    def advance(self, step: Step, first: int, stop: int, hidden: Tensor | None = None) -> Tensor:
        """Take the rows of a step (`begin`) through layers, without logits; hidden where not what the last call gave.

        Returns hidden [T, width], a view of a buffer that the next call overwrites.
        """
        if hidden is not None:
            self._buffers["hidden"][: step.rows].copy_(hidden)
        if first < stop:
            self._segments.run(step, first, stop, False)
        return self._buffers["hidden"][: step.rows]

    def logits(self, batch: Batch, pool: KVPool, hidden: Tensor) -> Tensor:
        """Logits [N, vocab] of a batch, from the hidden states [T, width] with which its rows left the layers."""
        step = self._step(batch, pool, turned=False)
        self._buffers["hidden"][: step.rows].copy_(hidden)
        self._segments.run(step, len(self.spec.layers), len(self.spec.layers), True)
        return self._first_logits(batch.logit_rows_N.shape[0])

    def states(self, first: int, stop: int, *, normed: bool = True) -> Tensor:
        """Hidden states, float32 [rows, width], of rows of a pass that has ended with the last layer; normed as for the head."""
        out = torch.empty_like(rows := self._buffers["hidden"][first:stop], dtype=torch.float32)
        if not normed:
            return out.copy_(rows)
        self.ops.rms_norm(rows, self.tensors["norm"], self.spec.norm_eps, self.spec.norm_offset, out)
        return out

    def picked(self, first: int, stop: int) -> Tensor:
        """As `states`, of rows [first, stop) of those whose logits the pass gave; a copy."""
        return self._buffers["picked"][first:stop].to(torch.float32, copy=True)

    def predict(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocab], float32, that the head gives for any hidden states [n, width]; good until the next call or pass."""
        out = []
        for low in range(0, len(hidden), self.max_samples):
            part = hidden[low : low + self.max_samples]
            self._buffers["picked"][: len(part)].copy_(part)
            self._finish(len(part))
            logits = self._buffers["logits"][: len(part)]
            out.append(logits if len(part) == len(hidden) else logits.clone())
        return out[0] if len(out) == 1 else torch.cat(out)

    def _finish(self, count: int) -> None:
        """Logits of the first rows of the buffer `picked`."""
        if self._head is not None:
            self._head(count)
        else:
            assert self.native is not None
            self.native.finish(self._operations[-1].runs[-1], count)

    def fill(self, batch: Batch, pool: KVPool, hidden: Tensor, first: int) -> None:
        """Store keys and values of layers from `first` on for rows that leave with `hidden` [T, width], and nothing else.

        They are what those layers would make of that state; the products have one row count, whatever the number of rows.
        """
        if not self._fillings:
            cut = slabs_for((SMALL_ROWS,)) if self.invariant else whole
            layers = range(len(self.spec.layers))
            self._fillings = (
                [filling(self._material, layer, cut) for layer in layers]
                if self.native is None
                else [cpu.filling(self._material, self.native, layer) for layer in layers]
            )
        step = self._step(batch, pool)
        self._buffers["hidden"][: step.rows].copy_(hidden)
        for layer in range(first, len(self.spec.layers)):
            group = self._group_of[layer]
            if group not in step.stored:
                self._place(step, group)
            self._fillings[layer](step, pool.index_of(self.groups[group]))

    def begin(self, batch: Batch, pool: KVPool, first: int, stop: int, keep: Tensor | None = None) -> Step:
        """Store positions and work out what every layer needs: slots as rows of memory, rope tables, attention tiles.

        keep: rows whose keys and values are stored, where not all are.
        """
        rows, wanted = batch.tokens_T.shape[0], batch.logit_rows_N.shape[0]
        assert rows <= self.max_rows, f"{rows} rows in a decoder built for {self.max_rows}"
        assert 0 <= first < stop <= len(self.spec.layers)
        if stop == len(self.spec.layers):
            assert wanted <= self.max_samples, f"{wanted} rows of logits in a decoder built for {self.max_samples}"
        step = self._stood
        if step is not None and batch.stands and keep is None and step.again(batch, pool, (first, stop)):
            return step
        step = self._step(batch, pool)
        step.keep, step.span = keep, (first, stop)
        techniques = by_technique(batch)
        step.dense = self.native is not None and self.native.attends(batch, pool)
        # A sequence's bits must not depend on its company: the kernels compute those without a technique, whoever stands beside.
        plain = next((members for technique, members in techniques if technique is DENSE), np.empty(0, np.int64))
        others = [(technique, members) for technique, members in techniques if technique is not DENSE or not step.dense]
        step.alone = step.dense and not others and batch.mass is None
        for group in sorted({self._group_of[layer] for layer in range(first, stop)}):
            where, at = batch.groups[group], self._place(step, group)
            step.attending[group] = []
            by_kernels = [ByKernels(plain, 0)]
            for technique, sequences in others:
                chunk = self.native.chunk if step.dense and self.native is not None else 0
                call = AttentionCall(self.ops, batch, where, pool, at, sequences, self.spec.heads, self._tiling, chunk)
                step.attending[group].append((technique, call, technique.plan(call)))
                if call.kernels is not None:
                    by_kernels.append(call.kernels)
            if step.dense:
                assert step.native is not None
                step.native.place(group, where, pool, at, keep, by_kernels)
                layers = sum(self._group_of[layer] == group for layer in range(first, stop))
                step.encoded += 2 * self.spec.kv_heads * layers * (rows if keep is None else len(keep))
            if batch.mass is not None and pool.groups[at].window is None:
                step.weighing[group] = self._weighing(step, group, at)
        step.encode()
        self._stood = step if step.alone and keep is None else None
        return step

    def _weighing(self, step: Step, group: int, at: int) -> Weighing:
        """What sums attention by entry in a group; `at` is its index in the pool."""
        batch, pool = step.batch, step.pool
        if step.dense:
            assert step.native is not None
            return step.native.weighing(group, batch, pool, at)
        plan = WeighingPlan(batch, batch.groups[group], pool, at, self.spec.heads, self._tiling)
        return lambda q, layer, scale, softcap: self.ops.attention_mass(
            q, pool, layer, plan, scale=scale, softcap=softcap
        )

    def _place(self, step: Step, group: int) -> int:
        """Store positions in a group, and remember where its keys go; returns the group's index in the pool."""
        where, at = step.batch.groups[group], step.pool.index_of(self.groups[group])
        if step.alone and step.native is not None:
            step.native.write_positions(where, step.pool, at)
        else:
            step.pool.write_positions(at, where.slots_T, step.batch.positions_T)
        if not step.dense:
            step.stored[group] = step.pool.row_of(at, *step.pool.split(at, where.slots_T))
        return at

    def _step(self, batch: Batch, pool: KVPool, *, turned: bool = True) -> Step:
        """turned: whether rope tables are wanted."""
        if self.native is None:
            ropes = self._ropes(batch.positions_T) if turned else {}
            return Step(batch, pool, batch.tokens_T.shape[0], ropes)
        native = self.native.begin(batch, self._ropes if turned else None)
        return Step(batch, pool, batch.tokens_T.shape[0], {}, native=native)

    # ------------------------------------------------------------------------------------------ seams

    def hook(self, seam: Seam, layer: int, fn: Hook) -> Callable[[], None]:
        """Call `fn(batch, tensors)` at the seam of the layer, in every pass that reaches it; returns a call that removes it.

        layer: 0 for INPUTS, the last for LOGITS.  Raises ConfigError when there is no such seam.
        """
        return self._segments.hook(seam, layer, fn)

    @property
    def segments(self) -> int:
        """Segments of a whole pass: 1 where nothing hooks in."""
        return len(self._segments.pieces(0, len(self.spec.layers)))


def build(
    spec: DecoderSpec,
    source: Path | Literal["random"] | Decoder,
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
    threads: int = 1,
    isa: str = "auto",
    formats: Mapping[str, WeightFormat] | None = None,
    activations: str = "float",
) -> Decoder:
    """Allocate, load and get ready to run.

    source      a folder with safetensors, "random" for noise drawn from `seed`, or a decoder whose weights this one reads too
    dtype       number format of weights, activations and KV: float32, bfloat16 or float16
    max_rows, max_samples   most rows of a batch, and most rows whose logits it wants
    groups      the KV groups of the model, in the order of a batch's groups
    invariant   whether a row's bits may depend on nothing but its own context; by default on a CPU in float32
    progress    called with (bytes loaded, bytes in all)
    ops         ref, or cpu: weft's own kernels, with `threads` threads and the instruction set `isa`, and activations in float32
    formats     of fused weights that are kept in few bits; the reference operations keep what they stand for in `dtype`
    activations float, or int8: inputs of products with such weights are rounded to 8 bits, each row with a scale of its own
    Raises ConfigError for a spec, dtype or checkpoint that cannot be used.
    """
    kind = getattr(torch, dtype) if isinstance(dtype, str) and dtype_bytes(dtype) else dtype
    assert isinstance(kind, torch.dtype)
    dtype_bytes(str(kind))
    if ops not in ("ref", "cpu"):
        raise ConfigError(f"a decoder's ops are ref or cpu, got {ops!r}")
    place = torch.device(device)
    inputs = activations if activations == "int8" else str(kind)[6:]
    native = cpu.Native(kernels(), spec, threads, isa, inputs) if ops == "cpu" else None
    if isinstance(source, Decoder):
        assert (source.spec, source.dtype) == (spec, kind)
        assert (source.native is None) == (native is None)
        memory, tensors = source.weights, source.tensors
    else:
        memory, tensors = allocate(spec, kind, place, native, formats)
        if isinstance(source, str):
            randomize(spec, tensors, seed, progress, formats)
        else:
            load(source, spec, tensors, progress, formats)
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
        ops=choose("ref"),
        native=native,
    )
