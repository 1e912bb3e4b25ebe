"""Gemma 2: four norms a layer whose weights are stored less 1, soft caps, scaled embeddings, windows on every other layer."""

from __future__ import annotations

from collections.abc import Iterator

from weft.models.families._config import Config, decoder
from weft.models.layout import Part, checkpoint_parts
from weft.models.spec import DecoderSpec, LayerSpec

MODEL_TYPE = "gemma2"
ARCHITECTURE = "Gemma2ForCausalLM"

HEAD_DIM = 256
"""Where the config names none."""

NORMS = {
    "norm_attention": "input_layernorm",
    "norm_attention_out": "post_attention_layernorm",
    "norm_mlp": "pre_feedforward_layernorm",
    "norm_mlp_out": "post_feedforward_layernorm",
}


def parts(spec: DecoderSpec) -> Iterator[Part]:
    """Llama's names, but for the norms."""
    return checkpoint_parts(spec, NORMS)


def spec(config: Config) -> DecoderSpec:
    """Even layers have the window unless `layer_types` says otherwise; queries are scaled by a number of their own."""
    if config.flag("use_bidirectional_attention", False):
        raise config.refuse("use_bidirectional_attention", "false: weft decodes causally")
    heads = config.heads(HEAD_DIM)
    dim = heads[2]
    rope = config.rope(dim)
    count = config.size("num_hidden_layers")
    windows = config.windows(count, config.window(), [index % 2 == 0 for index in range(count)])
    width = config.size("hidden_size")
    bias = config.flag("attention_bias", False)
    return decoder(
        config,
        "gemma2",
        heads=heads,
        max_positions=8192,
        norm_offset=1.0,
        embedding_scale=width**0.5,
        final_softcap=config.optional("final_logit_softcapping", 30.0),
        tied=True,
        layers=tuple(
            LayerSpec(
                weights=index,
                query_scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
                intermediate=config.size("intermediate_size"),
                window=windows[index],
                rope=rope,
                attention_softcap=config.optional("attn_logit_softcapping", 50.0),
                qkv_bias=bias,
                out_bias=bias,
                post_norm=True,
                activation=config.activation("hidden_activation", "gelu_pytorch_tanh"),
            )
            for index in range(count)
        ),
    )
