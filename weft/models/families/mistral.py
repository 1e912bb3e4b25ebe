"""Mistral: Llama's layers with a sliding window (v0.1), or without (later releases)."""

from __future__ import annotations

from weft.models.families._config import Config, decoder
from weft.models.layout import checkpoint_parts as parts
from weft.models.spec import DecoderSpec, LayerSpec

MODEL_TYPE = "mistral"
ARCHITECTURE = "MistralForCausalLM"

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "parts", "spec"]


def spec(config: Config) -> DecoderSpec:
    """`sliding_window` null means full attention; a missing key means 4096, as in the first release."""
    heads = config.heads()
    dim = heads[2]
    rope = config.rope(dim)
    count = config.size("num_hidden_layers")
    window = config.window()
    return decoder(
        config,
        "mistral",
        heads=heads,
        max_positions=131072,
        layers=tuple(
            LayerSpec(
                weights=index,
                query_scale=dim**-0.5,
                intermediate=config.size("intermediate_size"),
                window=window,
                rope=rope,
                activation=config.activation("hidden_act", "silu"),
            )
            for index in range(count)
        ),
    )
