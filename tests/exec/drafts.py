"""Draft models for tests: the bundled model without its last layers, which often agrees with it, one that never does, and a pair
so small that laws can be counted out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from weft.hub import resolve


def shallow(folder: Path, layers: int = 7) -> Path:
    """The bundled model cut after `layers` of its layers."""
    source = resolve(None)
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = layers
    tensors = load_file(source / "model.safetensors")
    gone = tuple(f"model.layers.{i}." for i in range(layers, 64))
    save_file({k: v for k, v in tensors.items() if not k.startswith(gone)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stranger(folder: Path, vocab: int = 4096) -> Path:
    """A random model of another shape: rows of KV that no block of the target divides, sliding windows, a short context."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": vocab, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 20, "max_position_embeddings": 192, "use_sliding_window": True,
        "sliding_window": 24, "max_window_layers": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **shape))
    model.save_pretrained(folder)
    return folder


def pair(target: Path, draft: Path, vocab: int = 24) -> Any:
    """Two random models that agree now and then; gives the target, as transformers has it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 128, "tie_word_embeddings": False, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape)).float().eval()
    model.save_pretrained(target)
    whole = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        for x in model.parameters():
            x += 0.1 * torch.randn_like(x) * (x.dim() > 1)
    model.save_pretrained(draft)
    model.load_state_dict(whole)
    return model
