"""Qwen3 (dense): RMSNorm on each head of queries and keys, a head size of its own, no biases unless asked."""

from __future__ import annotations

from weft.models.families._config import Config, decoder
from weft.models.layout import checkpoint_parts as parts
from weft.models.spec import DecoderSpec, LayerSpec

MODEL_TYPE = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "parts", "spec"]

HEAD_DIM = 128
"""Where the config names none (it need not be hidden_size / heads)."""


def spec(config: Config) -> DecoderSpec:
    """Windows as in Qwen2; `attention_bias` puts biases on all four projections."""
    heads = config.heads(HEAD_DIM)
    dim = heads[2]
    rope = config.rope(dim)
    count = config.size("num_hidden_layers")
    bias = config.flag("attention_bias", False)
    windows = config.upper_windows(count)
    return decoder(
        config,
        "qwen3",
        heads=heads,
        max_positions=32768,
        layers=tuple(
            LayerSpec(
                weights=index,
                query_scale=dim**-0.5,
                intermediate=config.size("intermediate_size"),
                window=windows[index],
                rope=rope,
                qkv_bias=bias,
                out_bias=bias,
                qk_norm=True,
                activation=config.activation("hidden_act", "silu"),
            )
            for index in range(count)
        ),
    )
