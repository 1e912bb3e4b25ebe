"""A decoder as data: what a `config.json` says, in the terms that `decoder.py` runs.

No torch here: the scheduler, the memory plan and the simulator read the same specs.

Legend.  width: hidden size.  heads: query heads.  kv_heads: key/value heads.  head_dim: values in one head.
A layer id says where a layer stands (and whose KV it has); a weight id says which weights it reads, so layers may share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from weft.errors import ConfigError
from weft.slots import Store
from weft.types import GroupKind, GroupSpec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Number formats that a model may be computed in, and the bytes of one value."""

PAD_ROWS = 64
"""Buffers hold a multiple of this many rows, so that products of fixed shapes may reach past a batch's end."""


def dtype_bytes(dtype: str) -> int:
    """Bytes of one value of `dtype` (a name such as "float32" or "torch.bfloat16").  Raises ConfigError if unknown."""
    name = dtype.removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ConfigError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (Su et al., arXiv:2104.09864) over the first `dim` values of a head.

    kind    default; linear: every frequency divided by `factor`; llama3: low frequencies divided by `factor`, with a smooth
            band between wavelengths original / high_factor and original / low_factor; yarn (Peng et al., arXiv:2309.00071);
            divided: each frequency divided by its own of `divisors` (how GGUF writes down llama3)
    theta   base of the frequencies
    original    positions that the model was first trained on (llama3, yarn)
    beta_fast, beta_slow   rotations over `original` positions where yarn's ramp begins and ends
    truncate               yarn: whether the ramp's ends are rounded outwards to whole dimensions
    attention_factor       multiplies cosine and sine (yarn's temperature)
    """

    kind: Literal["default", "linear", "llama3", "yarn", "divided"] = "default"
    theta: float = 10000.0
    dim: int
    factor: float = 1.0
    original: int = 0
    low_factor: float = 1.0
    high_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    """A mixture of experts in place of the MLP.

    num         experts in the layer
    top_k       experts that each row goes to, by softmax of the router's logits
    normalize   whether the chosen experts' weights are scaled to add up to 1
    intermediate    inner size of one expert
    """

    num: int
    top_k: int
    normalize: bool
    intermediate: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer.

    weights     weight id: layers with one id read the same weights
    attention   "softmax"; "latent" is reserved for MLA
    window      positions that a query sees, itself included; None sees all
    rope        None leaves queries and keys unrotated
    query_scale queries are multiplied by this before they meet the keys
    attention_softcap   scores become cap * tanh(score / cap)
    qkv_bias, out_bias, mlp_bias    which projections have biases
    qk_norm     RMSNorm over each head of queries and keys, before rope
    pre_norm, post_norm     where the norms stand: on the input of attention and MLP, on their output, or both (Gemma 2)
    activation  of the gate
    intermediate    inner size of the dense MLP; unused where `experts` is given
    """

    weights: int
    query_scale: float
    intermediate: int
    attention: Literal["softmax", "latent"] = "softmax"
    window: int | None = None
    rope: RopeSpec | None = None
    attention_softcap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    experts: ExpertSpec | None = None

    def same_weights(self, other: LayerSpec) -> bool:
        """Whether both layers' weights have the same names and shapes (they must where weight ids are equal)."""
        fields = ("intermediate", "attention", "qkv_bias", "out_bias", "mlp_bias", "qk_norm", "pre_norm", "post_norm")
        return all(getattr(self, f) == getattr(other, f) for f in fields) and self.experts == other.experts


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A whole decoder.

    family      name of the file in `families/` that maps weight names
    max_positions   longest context that the checkpoint claims, in tokens
    norm_eps    epsilon of every RMSNorm
    norm_offset added to every norm weight (Gemma stores weight - 1)
    embedding_scale     multiplies token embeddings
    final_softcap       logits become cap * tanh(logit / cap)
    tied        the output projection is the embedding
    kept        ids whose logits are computed, one for each row of the head; () for all (`models.trimmed`)
    """

    family: str
    vocab: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    max_positions: int
    norm_eps: float
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    final_softcap: float | None = None
    tied: bool = False
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("a model needs at least one layer")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        first: dict[int, LayerSpec] = {}
        for layer in self.layers:
            if not first.setdefault(layer.weights, layer).same_weights(layer):
                raise ConfigError(f"layers that share weights {layer.weights} differ in the shapes of those weights")

    @property
    def outputs(self) -> int:
        """Logits of a row."""
        return len(self.kept) or self.vocab

    @property
    def weight_ids(self) -> tuple[int, ...]:
        """Distinct weight ids, in the order in which layers first use them."""
        return tuple(dict.fromkeys(layer.weights for layer in self.layers))

    def layer_of_weights(self, weights: int) -> LayerSpec:
        """A layer that reads the given weights."""
        return next(layer for layer in self.layers if layer.weights == weights)


def kv_groups(
    spec: DecoderSpec, dtype: str, block_tokens: int = 16, store: Store | None = None
) -> tuple[list[GroupSpec], int]:
    """The KV groups of a model and the bytes of one block of their shared pool.

    One FULL group for the layers that see everything, one WINDOW group for each distinct window, and last one PARKED
    group for hidden states (float32, so that parking loses nothing) of requests that stop between layers.

    All blocks have `block_bytes`; the group with the largest entry has `block_tokens` entries in one, and the others as many
    times that, in powers of two, as fit: fewer bytes lie idle, and tables of all groups break at common positions.
    Inside a block: [layer of the group][key, value][entry][kv head][row], a row being head_dim values of `dtype`, or what
    `store` (the slot `kv.store`) makes of them.

    Raises ConfigError for a dtype that is not supported or block_tokens < 1.
    """
    if block_tokens < 1:
        raise ConfigError(f"block_tokens must be at least 1, not {block_tokens}")
    row_bytes = _row_bytes(spec, dtype, store)
    members: dict[int | None, list[int]] = {}
    for index, layer in enumerate(spec.layers):
        members.setdefault(layer.window, []).append(index)
    windows = sorted(members, key=lambda window: (window is not None, window))
    entry = {window: 2 * row_bytes * len(members[window]) for window in windows}
    block_bytes = max(entry.values()) * block_tokens
    hidden_bytes = spec.width * DTYPE_BYTES["float32"]
    unit = math.lcm(row_bytes, DTYPE_BYTES["float32"])
    block_bytes = -(-max(block_bytes, hidden_bytes) // unit) * unit

    groups = []
    for window in windows:
        tokens = block_tokens
        while 2 * tokens * entry[window] <= block_bytes:
            tokens *= 2
        groups.append(
            GroupSpec(
                name="full" if window is None else f"window{window}",
                kind=GroupKind.FULL if window is None else GroupKind.WINDOW,
                layers=tuple(members[window]),
                entry_bytes=entry[window],
                block_tokens=tokens,
                window=window,
            )
        )
    groups.append(
        GroupSpec(
            name="parked",
            kind=GroupKind.PARKED,
            layers=tuple(range(len(spec.layers))),
            entry_bytes=hidden_bytes,
            block_tokens=block_bytes // hidden_bytes,
        )
    )
    return groups, block_bytes


def _row_bytes(spec: DecoderSpec, dtype: str, store: Store | None) -> int:
    """Bytes of one entry's keys (or values) of one layer."""
    return spec.kv_heads * (spec.head_dim * dtype_bytes(dtype) if store is None else store.row_bytes(spec.head_dim))


def all_groups(
    specs: Mapping[str, DecoderSpec], dtype: str, block_tokens: int = 16, store: Store | None = None
) -> tuple[list[GroupSpec], int]:
    """The KV groups of several models over one pool, and the bytes of one of its blocks.

    specs: by name, the target first, whose blocks are those of `kv_groups`, rounded up to whole rows of every model.  A block
    holds as many entries of another model's groups as fit, at least one; such models have no PARKED group.
    Raises ConfigError as `kv_groups` does.
    """
    (_, target), *others = specs.items()
    groups, block_bytes = kv_groups(target, dtype, block_tokens, store)
    if not others:
        return groups, block_bytes
    found = {
        name: [g for g in kv_groups(spec, dtype, 1, store)[0] if g.kind is not GroupKind.PARKED]
        for name, spec in others
    }
    unit = math.lcm(DTYPE_BYTES["float32"], *(_row_bytes(spec, dtype, store) for spec in specs.values()))
    largest = max(block_bytes, *(g.entry_bytes for mine in found.values() for g in mine))
    block_bytes = -(-largest // unit) * unit
    for name, mine in found.items():
        groups += [
            msgspec.structs.replace(g, name=f"{name} {g.name}", model=name, block_tokens=block_bytes // g.entry_bytes)
            for g in mine
        ]
    return groups, block_bytes


def group_of_layers(spec: DecoderSpec, groups: Sequence[GroupSpec]) -> dict[int, int]:
    """The group that holds each layer's keys and values.  Raises ConfigError where a layer has none."""
    found: dict[int, int] = {}
    for index, group in enumerate(groups):
        if group.kind in (GroupKind.FULL, GroupKind.WINDOW):
            found.update(dict.fromkeys(group.layers, index))
    for index, layer in enumerate(spec.layers):
        if index not in found or groups[found[index]].window != layer.window:
            raise ConfigError(f"no KV group with window {layer.window} holds layer {index}")
    return found
