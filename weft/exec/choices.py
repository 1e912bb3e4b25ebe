"""What a user left open about an engine: number formats, device, memory, the second model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.config import Stack
from weft.errors import ConfigError
from weft.exec.host import available_memory
from weft.hub import resolve_draft
from weft.models import checkpoint_dtype, load_config
from weft.models.families import read
from weft.models.formats import WeightFormat
from weft.models.gguf.header import is_gguf
from weft.models.layout import quantized, tensor_shapes, weights_bytes
from weft.models.spec import DecoderSpec, dtype_bytes
from weft.registry import Part, parse

if TYPE_CHECKING:
    from weft.exec.build import EngineConfig

FLOAT32_BYTES = 1 << 30
"""A model whose float32 weights stay below this runs in float32 on a CPU unless asked otherwise: exactness costs it little."""


def formats(config: EngineConfig, spec: DecoderSpec, raw: Mapping[str, Any]) -> dict[str, WeightFormat]:
    """The formats of fused weights that are kept in few bits: what the user says, else what the checkpoint has.

    Raises ConfigError for one that they cannot have, or a checkpoint that cannot be read.
    """
    if config.activations not in ("float", "int8"):
        raise ConfigError(f"--activations is float or int8, got {config.activations!r}")
    if config.weights == "float":
        return {}
    if config.weights == "auto":
        folder = config.model
        if config.load != "auto" or not isinstance(folder, Path):
            return {}
        if not (is_gguf(folder) or raw.get("quantization_config")):
            return {}
        from weft.models.checkpoints.readers import opened

        return opened(folder, spec).formats
    wanted = quantized(spec, WeightFormat.parse(config.weights))
    for name, format in wanted.items():
        format.groups(tensor_shapes(spec)[name][-1])
    return wanted


def second(stack: Stack, spec: DecoderSpec) -> DecoderSpec | None:
    """The model that the stack wants beside the target.  Raises ConfigError where its ids are not the target's."""
    if stack.second is None:
        return None
    draft = read(load_config(resolve_draft(stack.second, weights=False)))
    if draft.vocab != spec.vocab and not getattr(stack["draft"], "translates", False):
        raise ConfigError(
            f"the draft model {stack.second} has a vocabulary of {draft.vocab} and the model one of {spec.vocab}: its guesses "
            "would mean other words; name a smaller model of the same family as model='...', or say draft=crossvocab"
        )
    return draft


def laws_bytes(stack: Stack, spec: DecoderSpec, sequences: int, most: int) -> int:
    """Laws of guesses that the target's first layers make, for an `accept` that weighs them."""
    guesses = min(most, int(stack["draft"].guesses)) if hasattr(stack["draft"], "exits") else 0
    return sequences * guesses * spec.vocab * dtype_bytes("float32")


def require_switch(flag: str, value: str) -> None:
    """Raise ConfigError where a flag that is on or off is neither."""
    if value not in ("on", "off"):
        raise ConfigError(f"{flag} is on or off, got {value!r}")


def _full_name(dtype: str) -> str:
    """'bf16' or 'torch.bfloat16' to 'bfloat16'."""
    name = dtype.removeprefix("torch.")
    return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "float": "float32", "half": "float16"}.get(
        name, name
    )


def choose_kv(
    wanted: str, dtype: str, techniques: Sequence[str | Part], device: str
) -> tuple[str, Sequence[str | Part]]:
    """(number format of keys and values, the techniques with the one that makes bytes of them).  dtype: the model's.

    Raises ConfigError for a format that does not run there, or one beside a technique that has its own.
    """
    name = _full_name(wanted)
    if name == "auto":
        return dtype, techniques
    if name not in ("float32", "bfloat16", "float16", "int8"):
        raise ConfigError(f"--kv is auto, float32, bfloat16 or int8, got {wanted!r}")
    if name == "float16" and device == "cpu":
        raise ConfigError("float16 runs on a GPU only; use --kv bfloat16, int8 or float32 on a CPU")
    for part in techniques:
        if (parse(part) if isinstance(part, str) else part).slot == "kv.store":
            raise ConfigError(
                f"--kv {wanted} and {part} both say how keys and values are stored; leave one of them out"
            )
    return (dtype, [*techniques, "kv.store=int8"]) if name == "int8" else (name, techniques)


def choose_dtype(wanted: str, raw: Mapping[str, Any], spec: DecoderSpec, device: str) -> str:
    """The number format of weights and activations, and of KV unless told otherwise.  Raises ConfigError."""
    name = _full_name(wanted)
    if name == "auto":
        name = checkpoint_dtype(dict(raw)) or "bfloat16"
        if device == "cpu":
            name = "bfloat16" if name == "float16" else name
            if weights_bytes(spec, "float32") <= FLOAT32_BYTES:
                name = "float32"
    dtype_bytes(name)
    if name == "float16" and device == "cpu":
        raise ConfigError("float16 runs on a GPU only; use --dtype bfloat16 or float32 on a CPU")
    return name


def device(wanted: str) -> str:
    """cpu or cuda.  Raises ConfigError for another word, and for cuda where no GPU answers."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device is auto, cpu or cuda, got {wanted!r}")
    if wanted == "cpu" or (wanted == "auto" and not Path("/dev/nvidiactl").exists()):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise ConfigError("--device cuda: this PyTorch sees no GPU; use --device cpu, or install a CUDA build of torch")
    return "cpu"


def available(device: str) -> tuple[int, str]:
    if device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        return int(free), "free memory of the GPU"
    limit = available_memory()
    return limit.bytes, limit.source


def require(config: EngineConfig) -> None:
    """What can be wrong without a model.  Raises ConfigError."""
    for name in ("max_num_seqs", "max_rows", "block_tokens", "max_loras"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.threads is not None and not 1 <= config.threads <= 1024:
        raise ConfigError(f"--threads must be from 1 to 1024, got {config.threads}")
    if config.load not in ("auto", "random"):
        raise ConfigError(f"--load is auto or random, got {config.load!r}")
    require_switch("--draft-control", config.draft_control)
