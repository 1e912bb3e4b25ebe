"""Small random checkpoints of every family, written by transformers, in which every part of the model matters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "truncate": False,
    "attention_factor": 1.3,
}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
MOE = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_bias_tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 24},
    ),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama_yarn": ("llama", {"rope_parameters": YARN}),
    "llama_yarn_plain": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "mscale": 1.4,
                "mscale_all_dim": 0.6,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 24, "num_key_value_heads": 1}),
    "mistral_full": ("mistral", {"sliding_window": None, "head_dim": 20}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("qwen2", dict(rope_parameters=YARN, **QWEN_WINDOW)),
    "qwen3": ("qwen3", {"head_dim": 24, "attention_bias": True}),
    "qwen3_window": ("qwen3", dict(head_dim=16, num_attention_heads=6, **QWEN_WINDOW)),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 24,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 9.0,
            "final_logit_softcapping": 6.0,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": ("qwen3_moe", dict(norm_topk_prob=True, mlp_only_layers=[1], **MOE)),
    "qwen3_moe_raw": ("qwen3_moe", dict(norm_topk_prob=False, decoder_sparse_step=2, attention_bias=True, **MOE)),
}


@dataclass(frozen=True)
class Checkpoint:
    """A folder, and the reference model that was saved there."""

    name: str
    folder: Path
    model: PreTrainedModel

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Reference logits [T, vocab] of every position."""
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def scale_weights(model: PreTrainedModel, seed: int) -> None:
    """Random weights under which attention is far from uniform, and norms, biases and routers are far from trivial."""
    generator = torch.Generator().manual_seed(seed)
    gemma = "gemma" in type(model).__name__.lower()
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() > 1:
            gain = (
                (1.6 if gemma else 2.0)
                if any(part in name for part in ("q_proj", "k_proj", "mlp.gate.weight"))
                else 1.0
            )
            noise *= gain * weight.shape[-1] ** -0.5
        elif "norm" in name:
            noise = noise * 0.3 + (0.2 if gemma else 2.0 if "q_norm" in name else 1.2)
        else:
            noise *= 0.5
        weight.data.copy_(noise)


def make(name: str, folder: Path, seed: int = 7) -> Checkpoint:
    """Write the variant's checkpoint into the folder."""
    kind, changes = VARIANTS[name]
    config = AutoConfig.for_model(kind, **{**SMALL, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    scale_weights(model, seed)
    model.tie_weights()
    model.save_pretrained(folder)
    return Checkpoint(name, folder, model)
