"""Adapters with weights of noise, in the form and naming of the package peft, and the same deltas merged into a checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Made:
    """An adapter's folder and W + delta of each adapted weight, by the checkpoint's name of it."""

    folder: Path
    deltas: dict[str, torch.Tensor]

    def merged(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of the model with the deltas in its weights."""
        found = copy.deepcopy(model)
        weights = dict(found.named_parameters())
        for name, delta in self.deltas.items():
            weights[name].data += delta
        return found


def make(
    folder: Path,
    model: PreTrainedModel,
    *,
    seed: int,
    rank: int = 4,
    alpha: float = 8.0,
    targets: Sequence[str] = TARGETS,
    layers: Sequence[int] | None = None,
    rslora: bool = False,
    gain: float = 0.15,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Made:
    """Write an adapter for a transformers model.  gain: size of its deltas beside the weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors, deltas = {}, {}
    scale = alpha / (rank**0.5 if rslora else rank)
    for name, weight in model.named_parameters():
        parts = name.split(".")
        if (
            weight.dim() < 2
            or len(parts) < 3
            or parts[-2] not in targets
            or (layers is not None and int(parts[2]) not in layers)
        ):
            continue
        a = torch.randn(rank, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
        b = torch.randn(weight.shape[0], rank, generator=generator) * gain / (scale * rank**0.5)
        a, b = a.to(dtype), b.to(dtype)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a, b
        deltas[name] = scale * b.float() @ a.float()
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/model",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "loftq_config": {},
        "rank_pattern": {},
        "use_dora": False,
        "use_rslora": rslora,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "layers_to_transform": None if layers is None else list(layers),
        **config,
    }
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(said))
    save_file(tensors, folder / "adapter_model.safetensors")
    return Made(folder, deltas)
