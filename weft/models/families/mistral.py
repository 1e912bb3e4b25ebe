"""Mistral: Llama's layers with a sliding window (v0.1), or without (later releases)."""

from __future__ import annotations

from weft.models.families._config import Config
from weft.models.layout import checkpoint_parts as parts
from weft.models.spec import DecoderSpec, LayerSpec

MODEL_TYPE = "mistral"
ARCHITECTURE = "MistralForCausalLM"

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "parts", "spec"]


def spec(config: Config) -> DecoderSpec:
    """`sliding_window` null means full attention; a missing key means 4096, as in the first release."""
    heads, kv_heads, dim = config.heads()
    rope = config.rope(dim)
    count = config.size("num_hidden_layers")
    window = config.window()
    return DecoderSpec(
        family="mistral",
        vocab=config.size("vocab_size"),
        width=config.size("hidden_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        max_positions=config.size("max_position_embeddings", 131072),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        tied=config.flag("tie_word_embeddings", False),
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
