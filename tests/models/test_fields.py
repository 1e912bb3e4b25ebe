"""Every field of a spec matters: a wrong value breaks parity with the reference, or is refused.

The cases are generated over the dataclasses' fields, so that a field without a mutation fails the test.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.checkpoints import Checkpoint
from tests.models.harness import Rows, bench_for
from tests.models.test_parity import TOLERANCE, prompt
from weft.errors import ConfigError
from weft.models import load_spec
from weft.models.spec import DecoderSpec, ExpertSpec, LayerSpec, RopeSpec

pytestmark = pytest.mark.usefixtures("ops")
Change = Callable[[Any], dict[str, Any]]

MUTATIONS: dict[tuple[type, str], tuple[str, Change]] = {
    (RopeSpec, "kind"): ("llama_linear", lambda r: {"kind": "default"}),
    (RopeSpec, "theta"): ("llama", lambda r: {"theta": 2.0 * r.theta}),
    (RopeSpec, "dim"): ("llama", lambda r: {"dim": r.dim // 2}),
    (RopeSpec, "factor"): ("llama_linear", lambda r: {"factor": 2.0}),
    (RopeSpec, "original"): ("llama3", lambda r: {"original": 64}),
    (RopeSpec, "low_factor"): ("llama3", lambda r: {"low_factor": 2.0}),
    (RopeSpec, "high_factor"): ("llama3", lambda r: {"high_factor": 2.0}),
    (RopeSpec, "beta_fast"): ("llama_yarn", lambda r: {"beta_fast": 3.0}),
    (RopeSpec, "beta_slow"): ("llama_yarn", lambda r: {"beta_slow": 0.3}),
    (RopeSpec, "truncate"): ("llama_yarn", lambda r: {"truncate": True}),
    (RopeSpec, "attention_factor"): ("llama_yarn", lambda r: {"attention_factor": 1.0}),
    (RopeSpec, "divisors"): (
        "llama",
        lambda r: {"kind": "divided", "divisors": tuple(1.0 + i for i in range(r.dim // 2))},
    ),
    (ExpertSpec, "num"): ("qwen3_moe", lambda e: {"num": e.num - 1}),
    (ExpertSpec, "top_k"): ("qwen3_moe", lambda e: {"top_k": 1}),
    (ExpertSpec, "normalize"): ("qwen3_moe", lambda e: {"normalize": False}),
    (ExpertSpec, "intermediate"): ("qwen3_moe", lambda e: {"intermediate": e.intermediate // 2}),
    (LayerSpec, "weights"): ("llama", lambda layer: {"weights": 0}),
    (LayerSpec, "query_scale"): ("gemma2", lambda layer: {"query_scale": 0.25}),
    (LayerSpec, "intermediate"): ("llama", lambda layer: {"intermediate": layer.intermediate - 2}),
    (LayerSpec, "attention"): ("llama", lambda layer: {"attention": "latent"}),
    (LayerSpec, "window"): ("mistral", lambda layer: {"window": layer.window + 1}),
    (LayerSpec, "rope"): ("llama", lambda layer: {"rope": None}),
    (LayerSpec, "attention_softcap"): ("gemma2", lambda layer: {"attention_softcap": None}),
    (LayerSpec, "qkv_bias"): ("qwen2", lambda layer: {"qkv_bias": False}),
    (LayerSpec, "out_bias"): ("llama_bias_tied", lambda layer: {"out_bias": False}),
    (LayerSpec, "mlp_bias"): ("llama_bias_tied", lambda layer: {"mlp_bias": False}),
    (LayerSpec, "qk_norm"): ("qwen3", lambda layer: {"qk_norm": False}),
    (LayerSpec, "pre_norm"): ("llama", lambda layer: {"pre_norm": False}),
    (LayerSpec, "post_norm"): ("gemma2", lambda layer: {"post_norm": False}),
    (LayerSpec, "activation"): ("gemma2", lambda layer: {"activation": "silu"}),
    (LayerSpec, "experts"): ("qwen3_moe", lambda layer: {"experts": None, "intermediate": 80}),
    (DecoderSpec, "family"): ("gemma2", lambda s: {"family": "llama"}),
    (DecoderSpec, "vocab"): ("llama", lambda s: {"vocab": s.vocab + 1}),
    (DecoderSpec, "width"): ("llama", lambda s: {"width": s.width + 4}),
    (DecoderSpec, "heads"): ("llama", lambda s: {"heads": s.heads // 2}),
    (DecoderSpec, "kv_heads"): ("llama", lambda s: {"kv_heads": 1}),
    (DecoderSpec, "head_dim"): ("llama", lambda s: {"head_dim": s.head_dim * 2}),
    (DecoderSpec, "layers"): ("llama", lambda s: {"layers": s.layers[:-1]}),
    (DecoderSpec, "max_positions"): ("llama", lambda s: {"max_positions": 64}),
    (DecoderSpec, "norm_eps"): ("llama", lambda s: {"norm_eps": 1e-6}),
    (DecoderSpec, "norm_offset"): ("gemma2", lambda s: {"norm_offset": 0.0}),
    (DecoderSpec, "embedding_scale"): ("gemma2", lambda s: {"embedding_scale": 1.0}),
    (DecoderSpec, "final_softcap"): ("gemma2", lambda s: {"final_softcap": None}),
    (DecoderSpec, "tied"): ("llama", lambda s: {"tied": True}),
    (DecoderSpec, "kept"): ("llama", lambda s: {"kept": tuple(range(s.vocab // 2))}),
}
ALL = [(kind, field.name) for kind in (RopeSpec, ExpertSpec, LayerSpec, DecoderSpec) for field in fields(kind)]


def mutate(spec: DecoderSpec, kind: type, change: Change) -> DecoderSpec:
    """The spec with one field of one of its parts set wrong, in every layer but the first where it is a layer's."""
    if kind is DecoderSpec:
        return replace(spec, **change(spec))
    layers = list(spec.layers)
    for index, layer in enumerate(layers):
        if kind is LayerSpec and index:
            layers[index] = replace(layer, **change(layer))
        elif kind is RopeSpec and layer.rope is not None:
            layers[index] = replace(layer, rope=replace(layer.rope, **change(layer.rope)))
        elif kind is ExpertSpec and layer.experts is not None:
            layers[index] = replace(layer, experts=replace(layer.experts, **change(layer.experts)))
    return replace(spec, layers=tuple(layers))


def distance(spec: DecoderSpec, reference: Checkpoint) -> float:
    """Largest difference of the logits, or infinity where the spec is refused."""
    tokens = prompt(5)
    try:
        bench = bench_for(spec, reference.folder, invariant=False)
        logits = bench.run([Rows("a", tokens, 0)])[0]
    except (ConfigError, AssertionError):
        return float("inf")
    wanted = reference.logits(tokens)
    return float((logits - wanted).abs().max()) if logits.shape == wanted.shape else float("inf")


@pytest.mark.parametrize(("kind", "name"), ALL, ids=[f"{kind.__name__}.{name}" for kind, name in ALL])
def test_wrong_value_breaks_parity(kind: type, name: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    variant, change = MUTATIONS[kind, name]
    reference = checkpoint(variant)
    spec = load_spec(reference.folder)
    wrong = mutate(spec, kind, change)
    assert wrong != spec
    assert distance(wrong, reference) > 10 * TOLERANCE


@pytest.mark.parametrize("variant", sorted({variant for variant, _ in MUTATIONS.values()}))
def test_right_values_keep_it(variant: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    reference = checkpoint(variant)
    assert distance(load_spec(reference.folder), reference) < TOLERANCE


def test_layers_may_share_weights(checkpoint: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    """A layer that reads another's weights has its own keys and values, and gives what a copy of the weights gives."""
    reference = checkpoint("llama").folder
    spec = load_spec(reference)
    tied = replace(spec, layers=(*spec.layers[:2], replace(spec.layers[2], weights=1)))
    (file,) = reference.glob("*.safetensors")
    tensors = load_file(file)
    once = {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name}
    twice = {
        name: once.get(name.replace(".layers.2.", ".layers.1."), tensor).clone() for name, tensor in tensors.items()
    }
    benches = []
    for name, one, weights in (("once", tied, once), ("twice", spec, twice)):
        folder = shutil.copytree(reference, tmp_path / name)
        save_file(weights, folder / file.name, metadata={"format": "pt"})
        benches.append(bench_for(one, folder, invariant=False))
    shared, whole = benches
    assert shared.decoder.weights_bytes < whole.decoder.weights_bytes
    tokens = prompt(6)
    assert torch.equal(shared.run([Rows("a", tokens, 0)])[0], whole.run([Rows("a", tokens, 0)])[0])
