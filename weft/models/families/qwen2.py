"""Qwen2 and Qwen2.5: Llama's layers with biases on queries, keys and values; windows from some layer on, if at all."""

from __future__ import annotations

from weft.models.families._config import Config, decoder
from weft.models.layout import checkpoint_parts as parts
from weft.models.spec import DecoderSpec, LayerSpec

MODEL_TYPE = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "parts", "spec"]


def spec(config: Config) -> DecoderSpec:
    """Biases on q, k and v always, on the output projection never."""
    heads = config.heads()
    dim = heads[2]
    rope = config.rope(dim)
    count = config.size("num_hidden_layers")
    windows = config.upper_windows(count)
    return decoder(
        config,
        "qwen2",
        heads=heads,
        max_positions=32768,
        layers=tuple(
            LayerSpec(
                weights=index,
                query_scale=dim**-0.5,
                intermediate=config.size("intermediate_size"),
                window=windows[index],
                rope=rope,
                qkv_bias=True,
                activation=config.activation("hidden_act", "silu"),
            )
            for index in range(count)
        ),
    )
