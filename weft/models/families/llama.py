"""Llama 2 and 3.x (and the many checkpoints that follow them): pre-norm, SiLU gate, grouped queries."""

from __future__ import annotations

from weft.models.families._config import Config
from weft.models.layout import checkpoint_parts as parts
from weft.models.spec import DecoderSpec, LayerSpec

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "parts", "spec"]


def spec(config: Config) -> DecoderSpec:
    """Full attention everywhere; `attention_bias` puts biases on all four projections, `mlp_bias` on all three."""
    heads, kv_heads, dim = config.heads()
    rope = config.rope(dim)
    bias = config.flag("attention_bias", False)
    return DecoderSpec(
        family="llama",
        vocab=config.size("vocab_size"),
        width=config.size("hidden_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        max_positions=config.size("max_position_embeddings", 2048),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        tied=config.flag("tie_word_embeddings", False),
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
