"""The model of a GGUF file in the transformers package, for `weft check`: read by the `gguf` package, not by weft.

What is weft's own here is the configuration (`weft.models.load_config`); names, blocks and the order of rows are the package's.
weft keeps the scales of the K types in float16.  The reference computes with such scales too, so that the comparison says
something of everything else; but only where every weight is, but for that rounding, what the package reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.models import load_config
from weft.models.gguf.checkpoint import opened

MODELS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


SCALE_ERROR = 3 * 2.0**-11
"""Share of a row's largest weight by which rounding to float16 may move another: scale times value is up to twice as large,
the offset up to as large, and each loses at most 2^-11 of itself."""


def _kept(stored: Any, exact: Any) -> Any:
    """A tensor's values (as the package reads them) with scales as weft keeps them; as they are if weft's differ by more."""
    import numpy as np
    import torch

    from weft.models.gguf.blocks import EXACT, quantized

    kind = stored.tensor_type.name
    if kind in EXACT or exact.ndim != 2:
        return exact
    ours = quantized(torch.from_numpy(np.array(stored.data)), kind, exact.shape).dequantized().numpy()
    near = np.abs(ours - exact) <= SCALE_ERROR * np.abs(exact).max(-1, keepdims=True)
    return ours if near.all() else exact


def reference_model(path: Path) -> Any:
    """The file's model, float32.  Raises ConfigError where the package is missing, or the model is none that it can fill."""
    import torch
    import transformers

    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            f"weft check reads GGUF files by the gguf package, which cannot be imported ({error}); "
            "install it with: pip install gguf"
        ) from None
    config = load_config(path)
    kind = MODELS.get(config["architectures"][0])
    if kind is None:
        raise ConfigError(f"weft check compares no GGUF files of {config['architectures'][0]} yet")
    rope = {"rope_type": "default", **config.pop("rope_scaling", {}), "rope_theta": config.pop("rope_theta")}
    divisors = rope.pop("divisors", None)
    if divisors is not None:
        rope["rope_type"] = "default"
    given = {key: value for key, value in config.items() if key not in ("gguf_file", "dtype")}
    settings = transformers.AutoConfig.for_model(kind, **given, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").float()
    tensors = {
        tensor.name: tensor
        for file in dict.fromkeys(file for file, _ in opened(path).tensors.values())
        for tensor in gguf.GGUFReader(file).tensors
    }
    architecture = "llama" if kind == "mistral" else kind
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, settings.num_hidden_layers)
    for name, weight in model.named_parameters():
        stored = tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        values = _kept(stored, gguf.quants.dequantize(stored.data, stored.tensor_type))
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = settings.num_attention_heads if ".q_proj." in name else settings.num_key_value_heads
            pairs = values.reshape(heads, -1, 2, *values.shape[1:])  # stored as d/2 pairs of rows for each head
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        weight.data.copy_(torch.from_numpy(values.copy()).float().view(weight.shape))
    if divisors is not None:
        model.model.rotary_emb.inv_freq /= torch.tensor(divisors)
    return model
