"""Qwen3-MoE: Qwen3's attention, and on most layers a mixture of experts in place of the MLP."""

from __future__ import annotations

from weft.errors import ConfigError
from weft.models.families._config import Config, decoder
from weft.models.layout import checkpoint_parts as parts
from weft.models.spec import DecoderSpec, ExpertSpec, LayerSpec

MODEL_TYPE = "qwen3_moe"
ARCHITECTURE = "Qwen3MoeForCausalLM"

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "parts", "spec"]


def _experts(config: Config) -> ExpertSpec:
    """The mixture that every sparse layer has.  Older configs say `num_experts`, newer may say `num_local_experts`."""
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    num = config.size(key, 128)
    top_k = config.size("num_experts_per_tok", 8)
    if top_k > num:
        raise config.refuse("num_experts_per_tok", f"at most {key} {num}")
    return ExpertSpec(
        num=num,
        top_k=top_k,
        normalize=config.flag("norm_topk_prob", False),
        intermediate=config.size("moe_intermediate_size", 768),
    )


def _sparse(config: Config, count: int) -> list[bool]:
    """Which layers have experts: every `decoder_sparse_step`-th, but for those in `mlp_only_layers`."""
    step = config.size("decoder_sparse_step", 1)
    dense = config.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(not isinstance(index, int) for index in dense):
        raise config.refuse("mlp_only_layers", "a list of layer numbers")
    return [index not in dense and (index + 1) % step == 0 for index in range(count)]


def spec(config: Config) -> DecoderSpec:
    """With `use_sliding_window` every layer has the window."""
    heads = config.heads()
    dim = heads[2]
    rope = config.rope(dim)
    count = config.size("num_hidden_layers")
    bias = config.flag("attention_bias", False)
    window = config.window() if config.flag("use_sliding_window", False) else None
    if config.values.get("layer_types") is not None:
        raise ConfigError("config.json: layer_types is not known in qwen3_moe; expected none")
    sparse = _sparse(config, count)
    experts = _experts(config) if any(sparse) else None
    return decoder(
        config,
        "qwen3_moe",
        heads=heads,
        max_positions=32768,
        layers=tuple(
            LayerSpec(
                weights=index,
                query_scale=dim**-0.5,
                intermediate=0 if sparse[index] else config.size("intermediate_size"),
                window=window,
                rope=rope,
                qkv_bias=bias,
                out_bias=bias,
                qk_norm=True,
                activation=config.activation("hidden_act", "silu"),
                experts=experts if sparse[index] else None,
            )
            for index in range(count)
        ),
    )
