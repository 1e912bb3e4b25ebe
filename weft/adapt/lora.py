"""LoRA: a product of two narrow matrices is added to each adapted weight, another pair for each request.

Paper    Hu et al., arXiv:2106.09685; the scale of use_rslora is Kalajdzievski's, arXiv:2312.03732
Rule     y = x W^T + x A^T (s B)^T with s = lora_alpha / r, or lora_alpha / sqrt(r) where use_rslora is set.  The delta is added
         right after the product, before bias-free norms, rope and activations see it
Shapes   x [T, K], A [R, K], B [N, R].  The parts of a fused product (q, k, v; gate, up) have their A below each other and their
         B as blocks of one matrix, so R is the sum of their ranks and one pair serves the product
Units    R: values.  rows_adapted: rows of products that were changed
Cost     2 T R (K + N) flops for each adapted product, and the adapter's weights with the zeros between the blocks.  Rows
         without an adapter pay nothing
Pays     where several fine-tunings of one model are asked for: the base weights are held and read once for all of them.  Its
         price is time: decoding is slower in 4 loads of 4, at 0.82 and 0.87 of the speed with one adapter for a batch of 8, at
         0.43 and 0.49 with eight of them
Differs  s is multiplied into B when the adapter is loaded.  Fidelity is meant against the adapted model, whose weights are
         W + s B A: an adapter is asked for because it changes the answers
Raises   ValueError for a name that is no name; ConfigError for files that are no LoRA of the served model
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from weft.errors import ConfigError, InvariantError
from weft.registry import register
from weft.slots import Adapter, Site
from weft.traits import Effect, Traits

if TYPE_CHECKING:
    from torch import Tensor

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_RANK = 1024
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    "use_dora": (None, False),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
"""Settings that must have one of these values."""
UNREAD = frozenset(
    "auto_mapping base_model_name_or_path inference_mode lora_dropout megatron_core peft_version qalora_group_size revision "
    "eva_config loftq_config r lora_alpha target_modules use_rslora layers_to_transform".split()
)
"""Settings that say nothing about the result, and those that `read` looks at itself; any other must be empty."""
WHY = {
    "use_dora": "DoRA rescales the whole weight, which this part does not do",
    "bias": "biases are not adapted",
    "modules_to_save": "whole modules are not replaced; merge them into the checkpoint",
    "init_lora_weights": "that way of starting also changes the base weights; save the adapter converted to plain LoRA",
    "target_modules": f"list modules among {', '.join(TARGETS)}",
}
TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")


@register("adapt", "lora")
@dataclass(slots=True, kw_only=True)
class LoRA:
    """name: of an adapter that is loaded.  path: its folder, for the server's own stack alone; a request names what is there."""

    name: str
    path: str | None = None
    acts: dict[str, int] = field(default_factory=lambda: {"rows_adapted": 0}, init=False, compare=False)
    adapter: Adapter | None = field(default=None, init=False, repr=False, compare=False)
    per_request: ClassVar[bool] = True
    traits: ClassVar[Traits] = Traits(effects=frozenset({Effect.REWRITES_KV, Effect.REDEFINES}))

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(
                "the name of an adapter has 1 to 128 letters, digits, dots, colons, slashes and dashes, and begins with "
                f"a letter or digit; got {self.name[:200]!r}"
            )

    # ------------------------------------------------------------------ files

    @classmethod
    def read(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], sites: Mapping[str, Site]
    ) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
        """(A, s B) of each product, out of an adapter_config.json and the tensors beside it, as the package peft writes them.

        tensors: float32 by name.  sites: by the checkpoint's names of its weights.
        """
        rank, scale, wanted = _settings(config, sites)
        pairs = _pairs(tensors, {w: sites[w] for w in wanted}, rank)
        fused: dict[tuple[int, str], list[str]] = {}
        for weight in wanted:  # in the order of the checkpoint's parts, so of their columns
            fused.setdefault((sites[weight].layer, sites[weight].product), []).append(weight)
        return {where: _fuse([(sites[w], *pairs[w]) for w in parts], scale, sites) for where, parts in fused.items()}

    @classmethod
    def trial(cls, folder: Path) -> dict[str, Any]:
        """An adapter with weights of noise for the bundled model, in `folder`."""
        return {"name": "trial", "path": str(_write_trial(folder, 0.2))}

    @classmethod
    def neutral(cls, folder: Path) -> dict[str, Any]:
        """The same with a B of zeros, as an adapter is before it is trained."""
        return {"name": "neutral", "path": str(_write_trial(folder, 0.0))}

    # ------------------------------------------------------------------ use

    def attach(self, adapters: Any) -> None:
        self.adapter = adapters.find(self.name, self.path)

    @property
    def digest(self) -> bytes:
        return b"" if self.adapter is None else self.adapter.digest

    def apply(self, layer: int, product: str, x: Tensor) -> Tensor | None:
        """x A^T (s B)^T, [T, N], in the dtype of x; None where the adapter leaves the product alone."""
        if self.adapter is None:
            raise InvariantError(f"the adapter {self.name!r} was never attached to its weights")
        pair = self.adapter.tensors.get((layer, product))
        if pair is None:
            return None
        a_RK, b_NR = pair
        self.acts["rows_adapted"] += len(x)
        delta: Tensor = self.adapter.multiply(self.adapter.multiply(x, a_RK), b_NR)
        return delta


def _settings(config: Mapping[str, Any], sites: Mapping[str, Site]) -> tuple[int, float, list[str]]:
    """(rank, scale, names of the adapted weights in the checkpoint's order) that a config asks for.  Raises ConfigError."""
    for key, value in config.items():
        if not (value in PLAIN[key] if key in PLAIN else key in UNREAD or not value):
            shown = repr(value) if len(repr(value)) <= 100 else "what it says"
            raise ConfigError(f"{key} = {shown} is not supported: {WHY.get(key, 'leave it out')}")
    if config.get("peft_type") != "LORA":
        raise ConfigError("peft_type is missing; an adapter of this kind says LORA")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"r must be a whole number from 1 to {MAX_RANK}, not {str(rank)[:40]}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ConfigError(f"lora_alpha must be a finite number, not {str(alpha)[:40]}")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    modules = config.get("target_modules")
    if not isinstance(modules, list) or not modules or not all(isinstance(m, str) for m in modules):
        raise ConfigError(f"target_modules must be a list of names: {WHY['target_modules']}")
    unknown = sorted(set(modules) - set(TARGETS))
    if unknown:
        raise ConfigError(
            f"target_modules has {unknown[0][:100]!r}, which is not adapted here: {WHY['target_modules']}"
        )
    layers = _layers(config.get("layers_to_transform"))
    there = [(name, name.removesuffix(".weight").rpartition(".")[2], site) for name, site in sites.items()]
    absent = sorted(set(modules) - {module for _, module, _ in there})
    if absent:
        raise ConfigError(f"target_modules has {absent[0]}, and this model has no such module outside its experts")
    chosen = [name for name, module, site in there if module in modules and (layers is None or site.layer in layers)]
    if not chosen:
        raise ConfigError("layers_to_transform names no layer of this model")
    return rank, scale, chosen


def _layers(given: Any) -> set[int] | None:
    if given is None:
        return None
    listed = given if isinstance(given, list) else [given]
    if not all(type(x) is int for x in listed):
        raise ConfigError("layers_to_transform must be layer numbers")
    return set(listed)


def _pairs(tensors: Mapping[str, Tensor], wanted: Mapping[str, Site], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each adapted weight, all of them and no others.  Raises ConfigError."""
    found: dict[tuple[str, str], Tensor] = {}
    for name, tensor in tensors.items():
        match = TENSOR.fullmatch(name)
        weight = f"{match[1]}.weight" if match else ""
        if match is None or weight not in wanted:
            raise ConfigError(f"the tensor {name[:200]!r} belongs to no module that adapter_config.json names")
        site = wanted[weight]
        shape = (rank, site.inputs) if match[2] == "A" else (site.outputs, rank)
        if tensor.shape != shape:
            raise ConfigError(
                f"{name} has the shape {list(tensor.shape)}; this model and r = {rank} ask for {list(shape)}"
            )
        found[weight, match[2]] = tensor
    for weight in wanted:
        for letter in "AB":
            if (weight, letter) not in found:
                module = weight.removesuffix(".weight")
                raise ConfigError(f"lora_{letter} of {module} is missing, which adapter_config.json asks for")
    return {weight: (found[weight, "A"], found[weight, "B"]) for weight in wanted}


def _fuse(parts: list[tuple[Site, Tensor, Tensor]], scale: float, sites: Mapping[str, Site]) -> tuple[Tensor, Tensor]:
    """One pair for a product: A below each other, s B as blocks at the columns of each part."""
    import torch

    here = parts[0][0]
    outputs = max(s.first + s.outputs for s in sites.values() if (s.layer, s.product) == (here.layer, here.product))
    ranks = [len(a) for _, a, _ in parts]
    fused = torch.zeros(outputs, sum(ranks))
    at = 0
    for (site, _, b), rank in zip(parts, ranks, strict=True):
        fused[site.first : site.first + site.outputs, at : at + rank] = b * scale
        at += rank
    return torch.cat([a for _, a, _ in parts]), fused


def _write_trial(folder: Path, size: float) -> Path:
    """An adapter of rank 4 on all seven modules of the bundled model's eight layers.  size: of the values in B."""
    import json

    import torch
    from safetensors.torch import save_file

    width, keys, inner, rank = 256, 128, 768, 4
    shapes = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (width, keys), "self_attn.v_proj": (width, keys)}
    shapes |= {"self_attn.o_proj": (width, width), "mlp.gate_proj": (width, inner), "mlp.up_proj": (width, inner)}
    shapes["mlp.down_proj"] = (inner, width)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(8):
        for module, (inputs, outputs) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * size
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "target_modules": list(TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
