"""What a GGUF checkpoint says of a model, in the words of a `config.json`, and its tensors by Llama's names.  No torch here.

    token_embd.weight       model.embed_tokens.weight           blk.N.attn_norm.weight  model.layers.N.input_layernorm.weight
    output_norm.weight      model.norm.weight                   blk.N.ffn_norm.weight   ...N.post_attention_layernorm.weight
    output.weight           lm_head.weight (else tied)          blk.N.attn_q.weight     ...N.self_attn.q_proj.weight
    rope_freqs.weight       divisors of the rope's frequencies  blk.N.ffn_gate.weight   ...N.mlp.gate_proj.weight

The architecture `llama` (Mistral's too) stores the rows of queries and keys so that the two dimensions that turn together are
neighbours; `Tensor.pairs` says so.  Mixtures of experts lie in one tensor for a layer, which is cut here.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.models.gguf.header import Entry, Header, TensorType, read

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}
"""`general.architecture`, and the class of the same model in transformers."""
PAIRED = frozenset({"llama"})
"""Architectures whose query and key rows are stored in pairs."""

SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
"""Keys of a config.json, and what stands for them behind the architecture's name."""
YARN = {
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
"""The same for `rope_scaling`."""
REQUIRED = (
    "embedding_length",
    "block_count",
    "attention.head_count",
    "context_length",
    "attention.layer_norm_rms_epsilon",
)

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
FREQUENCIES = "rope_freqs.weight"
MAX_FREQUENCIES = 1 << 12
MAX_FILES = 1000
MAX_NAMES = 1 << 20
"""Tensors, experts counted one by one."""

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
QUANTIZED_DTYPE = "float16"
"""The number format of blocks' scales, which stands for the checkpoint's own where its matrices are quantized."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor under the name that a safetensors checkpoint would give it: shape, and bytes [start, stop) of `file`.

    pairs: 0, or the head's size where its rows are stored as 0, d/2, 1, d/2 + 1, ... instead of 0, 1, 2, ...
    """

    file: Path
    type: TensorType
    shape: tuple[int, ...]
    start: int
    stop: int
    pairs: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All files of a checkpoint.  metadata: the first one's."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[Path, Entry]]


def opened(path: Path) -> Checkpoint:
    """A checkpoint by its file, or by the first of its numbered files.  Raises ConfigError."""
    first = read(path)
    tensors = {name: (path, entry) for name, entry in first.tensors.items()}
    count = first.metadata.get("split.count", 0)
    if type(count) is not int or not 0 <= count <= MAX_FILES:
        raise ConfigError(f"{path}: split.count is {str(count)[:40]}; expected at most {MAX_FILES} files")
    for file in _others(path, first, count):
        for name, entry in read(file).tensors.items():
            if name in tensors:
                raise ConfigError(f"{file}: the tensor {name!r} stands in {tensors[name][0].name} already")
            tensors[name] = (file, entry)
    total = first.metadata.get("split.tensors.count", len(tensors))
    if count > 1 and total != len(tensors):
        raise ConfigError(
            f"{path} and its {count - 1} other files have {len(tensors)} tensors; they should have {total}"
        )
    return Checkpoint(path, first.metadata, tensors)


def _others(path: Path, first: Header, count: int) -> Iterator[Path]:
    """The files that follow the first one."""
    if count < 2:
        return
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None or int(match[3]) != count or first.metadata.get("split.no", 0) != int(match[2]) - 1:
        raise ConfigError(
            f"{path} is one of {count} files; their names must end in -00001-of-{count:05}.gguf and so on"
        )
    if int(match[2]) != 1:
        raise ConfigError(
            f"{path} is a later part of a checkpoint; name the first, {match[1]}-00001-of-{match[3]}.gguf"
        )
    for number in range(2, count + 1):
        file = path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf")
        if not file.is_file():
            raise ConfigError(
                f"{file}, the {number}. of {count} files of this checkpoint, does not exist; fetch it too"
            )
        yield file


def architecture(checkpoint: Checkpoint) -> str:
    """One of ARCHITECTURES.  Raises ConfigError for another."""
    name = checkpoint.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"{checkpoint.path}: the architecture {str(name)[:60]!r} (general.architecture) is not read from GGUF; weft "
            f"reads {', '.join(ARCHITECTURES)}: use the safetensors checkpoint of this model"
        )
    return str(name)


def config(path: Path) -> dict[str, Any]:
    """What the model's `config.json` would say, as far as weft reads it.  Raises ConfigError."""
    checkpoint = opened(path)
    name = architecture(checkpoint)
    own = {key.removeprefix(f"{name}."): v for key, v in checkpoint.metadata.items() if key.startswith(f"{name}.")}
    missing = [f"{name}.{key}" for key in REQUIRED if key not in own]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}: it holds no whole model")
    if name == "llama" and own.get("expert_count"):
        raise ConfigError(f"{path}: mixtures of experts of the architecture llama (Mixtral) are not supported")
    found: dict[str, Any] = {"gguf_file": str(path), "architectures": [ARCHITECTURES[name]]}
    for key, source in SIZES.items():
        value = _one(path, f"{name}.{source}", own.get(source))
        if value is not None:
            found[key] = value
    if not found.get("sliding_window"):
        found.pop("sliding_window", None)
    elif name == "llama":
        found["architectures"] = ["MistralForCausalLM"]
    dim = found.get("head_dim") or _head_dim(path, found)
    if type(dim) is not int:
        raise ConfigError(f"{path}: {name}.attention.key_length is {str(dim)[:40]!r}; expected a whole number")
    found["head_dim"] = dim
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, dim) != dim:
            raise ConfigError(
                f"{path}: {name}.{key} is {str(own[key])[:40]}; heads have {dim} values, and only such are read"
            )
    tensors = checkpoint.tensors
    if "token_embd.weight" not in tensors:
        raise ConfigError(
            f"{path} has no tensor token_embd.weight: it holds a vocabulary or a part of a model, not a model"
        )
    found["vocab_size"] = tensors["token_embd.weight"][1].shape[0]
    found["tie_word_embeddings"] = "output.weight" not in tensors
    found["attention_bias"] = "blk.0.attn_q.bias" in tensors
    found["mlp_bias"] = "blk.0.ffn_down.bias" in tensors
    found["norm_topk_prob"] = True
    found["rope_theta"] = own.get("rope.freq_base", 10000.0)
    scaling = _scaling(checkpoint, name, own, dim)
    if scaling:
        found["rope_scaling"] = scaling
    found["dtype"] = DTYPES.get(tensors["token_embd.weight"][1].type.name, QUANTIZED_DTYPE)
    return found


def _one(path: Path, key: str, value: Any) -> Any:
    """A value that may be given for each layer, and must be the same for all."""
    if not isinstance(value, tuple):
        return value
    if not value or any(v != value[0] for v in value):
        raise ConfigError(f"{path}: {key} differs from layer to layer, which weft does not read")
    return value[0]


def _head_dim(path: Path, found: Mapping[str, Any]) -> int:
    width, heads = found["hidden_size"], found["num_attention_heads"]
    if type(width) is not int or type(heads) is not int or heads < 1 or width % heads:
        raise ConfigError(f"{path}: {str(width)[:40]} values cannot be parted among {str(heads)[:40]} heads")
    return width // heads


def _scaling(checkpoint: Checkpoint, name: str, own: Mapping[str, Any], dim: int) -> dict[str, Any] | None:
    """A config.json's `rope_scaling`."""
    path = checkpoint.path
    kind = own.get("rope.scaling.type", "linear" if "rope.scale_linear" in own else "none")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 0.0))
    if FREQUENCIES in checkpoint.tensors:
        if kind not in ("none", "linear") or factor not in (0.0, 1.0):
            raise ConfigError(
                f"{path} has {FREQUENCIES} beside {name}.rope.scaling.type {str(kind)[:40]!r}; expected one of both"
            )
        return {"rope_type": "divided", "divisors": list(_frequencies(checkpoint, dim))}
    if kind == "none" or (kind == "linear" and factor == 0.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ConfigError(f"{path}: {name}.rope.scaling.type is {str(kind)[:40]!r}; weft reads none, linear and yarn")
    if own.get("rope.scaling.yarn_ext_factor", 1.0) != 1.0 or "rope.scaling.yarn_log_multiplier" in own:
        raise ConfigError(
            f"{path}: this form of {name}.rope.scaling (yarn_ext_factor, yarn_log_multiplier) is not read"
        )
    found = {"rope_type": "yarn", "factor": factor}
    found |= {key: own[source] for key, source in YARN.items() if source in own}
    attention = own.get("rope.scaling.yarn_attn_factor", own.get("rope.scaling.attn_factor", 1.0))
    if attention != 1.0:
        if type(attention) is not float or type(factor) is not float or not factor >= 1.0:
            raise ConfigError(f"{path}: the factors of {name}.rope.scaling are no numbers from 1 on")
        found["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return found


def _frequencies(checkpoint: Checkpoint, dim: int) -> tuple[float, ...]:
    """What the frequency of each pair of dimensions is divided by (Llama 3.1's rule, worked out by the converter)."""
    file, entry = checkpoint.tensors[FREQUENCIES]
    if entry.type.name != "F32" or entry.shape != (dim // 2,) or dim > MAX_FREQUENCIES:
        raise ConfigError(
            f"{file}: {FREQUENCIES} is {entry.type.name} {list(entry.shape)[:4]}; expected F32 with {dim // 2} values"
        )
    with open(file, "rb") as handle:
        handle.seek(entry.start)
        data = handle.read(entry.stop - entry.start)
    return struct.unpack(f"<{dim // 2}f", data)


def catalogue(path: Path) -> dict[str, Tensor]:
    """Every tensor by the name that Llama's checkpoints give it; those without such a name keep their own."""
    checkpoint = opened(path)
    name = architecture(checkpoint)
    heads = _one(path, f"{name}.attention.head_count", checkpoint.metadata.get(f"{name}.attention.head_count"))
    key = f"{name}.attention.head_count_kv"
    kv_heads = _one(path, key, checkpoint.metadata.get(key, heads))
    counts = {"attn_q": heads, "attn_k": kv_heads} if name in PAIRED else {}
    found: dict[str, Tensor] = {}
    for own, (file, entry) in checkpoint.tensors.items():
        if own != FREQUENCIES:
            for given, tensor in _named(own, Tensor(file, entry.type, entry.shape, entry.start, entry.stop), counts):
                if given in found or len(found) == MAX_NAMES:
                    raise ConfigError(
                        f"{file}: {own} is one tensor too many: {given} is there already, or {MAX_NAMES} others"
                    )
                found[given] = tensor
    return found


def _named(own: str, tensor: Tensor, counts: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(Llama's name, tensor) of what lies in one tensor of the file.  counts: heads, where rows are stored in pairs."""
    match = re.fullmatch(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)", own)
    if match is None:
        stem, _, kind = own.rpartition(".")
        yield f"{OUTER[stem]}.{kind}" if stem in OUTER else own, tensor
        return
    layer, part, kind = match.groups()
    here = f"model.layers.{int(layer)}"
    if part in EXPERTS and len(tensor.shape) == 3:
        for index, one in enumerate(_experts(tensor)):
            yield f"{here}.mlp.experts.{index}.{EXPERTS[part]}.{kind}", one
        return
    if part in counts:
        rows, count = tensor.shape[0], counts[part]
        if type(count) is not int or count < 1 or rows % (2 * count):
            raise ConfigError(f"{tensor.file}: the {rows} rows of {own} cannot be parted among {str(count)[:40]} heads")
        tensor = replace(tensor, pairs=rows // count)
    yield f"{here}.{INNER[part]}.{kind}" if part in INNER else own, tensor


def _experts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor's slices, one for each expert."""
    count = tensor.shape[0]
    size = (tensor.stop - tensor.start) // count
    for index in range(count):
        start = tensor.start + index * size
        yield replace(tensor, shape=tensor.shape[1:], start=start, stop=start + size)


__all__ = ["ARCHITECTURES", "Checkpoint", "Tensor", "architecture", "catalogue", "config", "opened"]
