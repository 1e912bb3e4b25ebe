"""The tensors of a decoder in memory, fused as the operations read them, and what the checkpoint calls their parts.

    embed [vocab, width]   norm [width]   head [vocab, width] unless tied
    and for each weight id w, as the layer has them:
    w.norm_attention, w.norm_attention_out, w.norm_mlp, w.norm_mlp_out [width]
    w.qkv [(heads + 2 kv_heads) * head_dim, width]   w.qkv_bias   w.q_norm, w.k_norm [head_dim]
    w.out [width, heads * head_dim]   w.out_bias
    w.gate_up [2 intermediate, width]   w.gate_up_bias   w.down [width, intermediate]   w.down_bias
    w.router [experts, width]   w.experts_gate_up [experts, 2 i, width]   w.experts_down [experts, width, i]

All of them lie in one arena, each at a multiple of ALIGN_BYTES.  No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from weft.models.formats import WeightFormat
from weft.models.spec import PAD_ROWS, DecoderSpec, LayerSpec, dtype_bytes

ALIGN_BYTES = 64
PANEL = 16
"""Outputs of a weight that the kernels compute side by side."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor: `name`, of `shape`, fills rows [first, first + shape[0]) of `target` (of its `expert`)."""

    name: str
    target: str
    shape: Shape
    first: int = 0
    expert: int | None = None


def layer_shapes(spec: DecoderSpec, layer: LayerSpec) -> dict[str, Shape]:
    """Fused tensors of one layer, without the weight id in their names."""
    width, dim = spec.width, spec.head_dim
    qkv = (spec.heads + 2 * spec.kv_heads) * dim
    shapes: dict[str, Shape] = {}
    if layer.pre_norm:
        shapes["norm_attention"] = shapes["norm_mlp"] = (width,)
    if layer.post_norm:
        shapes["norm_attention_out"] = shapes["norm_mlp_out"] = (width,)
    shapes["qkv"] = (qkv, width)
    shapes["out"] = (width, spec.heads * dim)
    if layer.qkv_bias:
        shapes["qkv_bias"] = (qkv,)
    if layer.out_bias:
        shapes["out_bias"] = (width,)
    if layer.qk_norm:
        shapes["q_norm"] = shapes["k_norm"] = (dim,)
    if layer.experts is not None:
        num, inner = layer.experts.num, layer.experts.intermediate
        shapes["router"] = (num, width)
        shapes["experts_gate_up"] = (num, 2 * inner, width)
        shapes["experts_down"] = (num, width, inner)
        return shapes
    shapes["gate_up"] = (2 * layer.intermediate, width)
    shapes["down"] = (width, layer.intermediate)
    if layer.mlp_bias:
        shapes["gate_up_bias"] = (2 * layer.intermediate,)
        shapes["down_bias"] = (width,)
    return shapes


def tensor_shapes(spec: DecoderSpec) -> dict[str, Shape]:
    """Every fused tensor of the decoder and its shape, in the order in which they lie in memory."""
    shapes: dict[str, Shape] = {"embed": (spec.vocab, spec.width)}
    for weights in spec.weight_ids:
        for name, shape in layer_shapes(spec, spec.layer_of_weights(weights)).items():
            shapes[f"{weights}.{name}"] = shape
    shapes["norm"] = (spec.width,)
    if not spec.tied:
        shapes["head"] = (spec.outputs, spec.width)
    return shapes


def padded(rows: int) -> int:
    """Rows that a buffer for `rows` rows holds."""
    return -(-rows // PAD_ROWS) * PAD_ROWS


def buffer_shapes(
    spec: DecoderSpec, dtype: str, max_rows: int, max_samples: int, panels: bool = False
) -> dict[str, tuple[Shape, str]]:
    """The decoder's named buffers: shape and dtype of each.  panels: for the kernels, which keep a mixture's rows in some, too.

    hidden: the residual stream.  normed: what a projection reads.  projected: what attention or MLP adds to the stream.
    picked: final-normed rows whose logits are wanted.
    """
    rows, samples = padded(max_rows), padded(max_samples)
    width, dim = spec.width, spec.head_dim
    inner = max((layer.intermediate for layer in spec.layers if layer.experts is None), default=0)
    stream = (rows, width), dtype
    shapes: dict[str, tuple[Shape, str]] = {"hidden": stream, "normed": stream, "projected": stream}
    shapes["qkv"] = (rows, (spec.heads + 2 * spec.kv_heads) * dim), dtype
    shapes["attended"] = (rows, spec.heads * dim), dtype
    shapes["gate_up"] = (rows, 2 * inner), dtype
    shapes["gated"] = (rows, inner), dtype
    shapes["router"] = (rows, max((layer.experts.num for layer in spec.layers if layer.experts), default=0)), dtype
    if panels:
        shapes.update(_pairs(spec, rows))
    shapes["picked"] = (samples, width), dtype
    shapes["logits"] = (samples, spec.outputs), "float32"
    if dtype != "float32":
        shapes["narrow_logits"] = (samples, spec.outputs), dtype
    return shapes


def _pairs(spec: DecoderSpec, rows: int) -> dict[str, tuple[Shape, str]]:
    """Where the kernels compute a mixture of experts: for each pair of a row and one of its experts."""
    found = [layer.experts for layer in spec.layers if layer.experts is not None]
    if not found:
        return {}
    each, inner = rows * max(e.top_k for e in found), max(e.intermediate for e in found)
    return {
        "shares": ((each,), "float32"),
        "ids": ((2 * each,), "float32"),  # whole numbers of 8 bytes
        "pair_gate_up": ((each, 2 * inner), "float32"),
        "pair_gated": ((each, inner), "float32"),
        "pair_outputs": ((each, spec.width), "float32"),
    }


def buffer_bytes(shapes: Mapping[str, tuple[Shape, str]]) -> dict[str, int]:
    """Bytes of each buffer."""
    return {name: math.prod(shape) * dtype_bytes(dtype) for name, (shape, dtype) in shapes.items()}


def workspace_bytes(spec: DecoderSpec, dtype: str, max_rows: int, max_samples: int, panels: bool = False) -> int:
    """Bytes of the decoder's buffers, exactly as they are allocated."""
    name = dtype.removeprefix("torch.")
    return arena(buffer_bytes(buffer_shapes(spec, name, max_rows, max_samples, panels)))[1]


def arena(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """(byte offset of each tensor, total bytes) of an arena that holds tensors of so many bytes one after the other."""
    offsets, at = {}, 0
    for name, size in sizes.items():
        offsets[name] = at
        at += -(-size // ALIGN_BYTES) * ALIGN_BYTES
    return offsets, at


def panel_bytes(width: int, format: int | WeightFormat) -> int:
    """Bytes of one panel of rows of `width` inputs, whose values have so many bytes or such a format.

    Behind the values stand the scales, and the offsets of a format that has them: float16, or float32 where all of a row shares
    them; or a line of the rows' scales and a byte for each group's multiple; whole lines (`Weight` in native/src/kernels.h).
    """
    if isinstance(format, int):
        return PANEL * width * format
    groups = format.groups(width)
    if format.nested and groups > 1:
        return PANEL * width * format.bits // 8 + ALIGN_BYTES + -(-groups * PANEL // ALIGN_BYTES) * ALIGN_BYTES
    scale = PANEL * (2 if groups > 1 else 4) * (1 if format.symmetric else 2)
    return PANEL * width * format.bits // 8 + -(-groups * scale // ALIGN_BYTES) * ALIGN_BYTES


def quantized(spec: DecoderSpec, format: WeightFormat | None) -> dict[str, WeightFormat]:
    """The fused tensors that are kept in a format of few bits: all matrices but routers, embedding and head among them."""
    if format is None:
        return {}
    shapes = tensor_shapes(spec)
    return {name: format for name, shape in shapes.items() if len(shape) > 1 and not name.endswith(".router")}


def stored_bytes(
    spec: DecoderSpec, dtype: str, panels: bool = False, formats: Mapping[str, WeightFormat] | None = None
) -> dict[str, int]:
    """Bytes of each fused tensor.

    panels: matrices as the kernels read them (`weft.ops.cpu`), each in its format; else all are dense.
    """
    size, found = dtype_bytes(dtype), {}
    for name, shape in tensor_shapes(spec).items():
        if panels and len(shape) > 1:
            format = (formats or {}).get(name, size)
            found[name] = math.prod(shape[:-2]) * -(-shape[-2] // PANEL) * panel_bytes(shape[-1], format)
        else:
            found[name] = math.prod(shape) * size
    return found


def weights_bytes(
    spec: DecoderSpec, dtype: str, panels: bool = False, formats: Mapping[str, WeightFormat] | None = None
) -> int:
    """Bytes of the decoder's weights, exactly as they are allocated (see `stored_bytes`)."""
    return arena(stored_bytes(spec, dtype, panels, formats))[1]


def parameters(spec: DecoderSpec) -> int:
    """Number of weights; shared and tied ones count once."""
    return sum(math.prod(shape) for shape in tensor_shapes(spec).values())


PLAIN_NORMS = {"norm_attention": "input_layernorm", "norm_mlp": "post_attention_layernorm"}


def checkpoint_parts(spec: DecoderSpec, norms: Mapping[str, str] = PLAIN_NORMS) -> Iterator[Part]:
    """The tensors of a checkpoint named as Llama's are, which most families follow.

    norms: what the family calls each norm that stands on a layer's input or output.
    """
    yield Part("model.embed_tokens.weight", "embed", (spec.vocab, spec.width))
    for weights in spec.weight_ids:
        layer = spec.layer_of_weights(weights)
        here = f"model.layers.{weights}"
        shapes = layer_shapes(spec, layer)
        for name, shape in shapes.items():
            if name in norms:
                yield Part(f"{here}.{norms[name]}.weight", f"{weights}.{name}", shape)
        yield from _attention_parts(spec, layer, weights, here)
        yield from _mlp_parts(spec, layer, weights, here)
    yield Part("model.norm.weight", "norm", (spec.width,))
    if not spec.tied:
        yield Part("lm_head.weight", "head", (spec.vocab, spec.width))


def _attention_parts(spec: DecoderSpec, layer: LayerSpec, weights: int, here: str) -> Iterator[Part]:
    first = 0
    for letter, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads)):
        rows = heads * spec.head_dim
        name = f"{here}.self_attn.{letter}_proj"
        yield Part(f"{name}.weight", f"{weights}.qkv", (rows, spec.width), first)
        if layer.qkv_bias:
            yield Part(f"{name}.bias", f"{weights}.qkv_bias", (rows,), first)
        if layer.qk_norm and letter != "v":
            yield Part(f"{here}.self_attn.{letter}_norm.weight", f"{weights}.{letter}_norm", (spec.head_dim,))
        first += rows
    yield Part(f"{here}.self_attn.o_proj.weight", f"{weights}.out", (spec.width, spec.heads * spec.head_dim))
    if layer.out_bias:
        yield Part(f"{here}.self_attn.o_proj.bias", f"{weights}.out_bias", (spec.width,))


def _mlp_parts(spec: DecoderSpec, layer: LayerSpec, weights: int, here: str) -> Iterator[Part]:
    width = spec.width
    if layer.experts is not None:
        inner = layer.experts.intermediate
        yield Part(f"{here}.mlp.gate.weight", f"{weights}.router", (layer.experts.num, width))
        for expert in range(layer.experts.num):
            name = f"{here}.mlp.experts.{expert}"
            both = f"{weights}.experts_gate_up"
            yield Part(f"{name}.gate_proj.weight", both, (inner, width), 0, expert)
            yield Part(f"{name}.up_proj.weight", both, (inner, width), inner, expert)
            yield Part(f"{name}.down_proj.weight", f"{weights}.experts_down", (width, inner), 0, expert)
        return
    inner = layer.intermediate
    for index, name in enumerate(("gate_proj", "up_proj")):
        yield Part(f"{here}.mlp.{name}.weight", f"{weights}.gate_up", (inner, width), index * inner)
        if layer.mlp_bias:
            yield Part(f"{here}.mlp.{name}.bias", f"{weights}.gate_up_bias", (inner,), index * inner)
    yield Part(f"{here}.mlp.down_proj.weight", f"{weights}.down", (width, inner))
    if layer.mlp_bias:
        yield Part(f"{here}.mlp.down_proj.bias", f"{weights}.down_bias", (width,))
