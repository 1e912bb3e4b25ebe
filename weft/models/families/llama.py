"""Llama 2 and 3.x (and the many checkpoints that follow them): pre-norm, SiLU gate, grouped queries."""

from __future__ import annotations

from weft.models.families._config import Config, decoder
from weft.models.layout import checkpoint_parts as parts
from weft.models.spec import DecoderSpec, LayerSpec

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "parts", "spec"]


def spec(config: Config) -> DecoderSpec:
    """Full attention everywhere; `attention_bias` puts biases on all four projections, `mlp_bias` on all three."""
    heads = config.heads()
    dim = heads[2]
    rope = config.rope(dim)
    bias = config.flag("attention_bias", False)
    return decoder(
        config,
        "llama",
        heads=heads,
        max_positions=2048,
        layers=tuple(
            LayerSpec(
                weights=index,
                query_scale=dim**-0.5,
                intermediate=config.size("intermediate_size"),
                rope=rope,
                qkv_bias=bias,
                out_bias=bias,
                mlp_bias=config.flag("mlp_bias", False),
                activation=config.activation("hidden_act", "silu"),
            )
            for index in range(config.size("num_hidden_layers"))
        ),
    )
