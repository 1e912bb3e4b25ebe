"""Reading `config.json`: old and new spellings, defaults, and an error that names the key for every value that cannot be."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from weft.errors import ConfigError
from weft.models import checkpoint_dtype, load_config, load_spec
from weft.models.families import families, read
from weft.models.layout import parameters

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ROOT = Path(__file__).resolve().parents[2]


def config(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    values = {**BASE, "architectures": [families()[kind].ARCHITECTURE], "model_type": kind, **changes}
    return {key: value for key, value in values.items() if value is not ...}


def test_every_family_is_found() -> None:
    assert set(families()) == {"llama", "mistral", "qwen2", "qwen3", "gemma2", "qwen3_moe"}
    for name, family in families().items():
        assert read(config(name)).family == name == family.MODEL_TYPE


def test_model_type_serves_where_no_architecture_is_named() -> None:
    assert read(config("qwen2", architectures=...)).family == "qwen2"


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 20, "truncate": False, "attention_factor": 1.25},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["linear", "yarn", "yarn_options", "llama3"],
)
def test_old_and_new_rope_spellings(scaling: dict[str, Any]) -> None:
    new = read(config(rope_parameters={**scaling, "rope_theta": 5e5}))
    older = read(config(rope_theta=5e5, rope_scaling=scaling))
    legacy = {**scaling, "type": scaling["rope_type"]}
    del legacy["rope_type"]
    assert new == older == read(config(rope_theta=5e5, rope_scaling=legacy, rope_parameters={"rope_theta": 5e5}))
    rope = new.layers[0].rope
    assert rope is not None
    assert (rope.theta, rope.factor) == (5e5, scaling["factor"])


def test_yarn_attention_factor() -> None:
    def factor(**given: Any) -> float:
        rope = read(config(rope_parameters={"rope_type": "yarn", "factor": 4.0, **given})).layers[0].rope
        assert rope is not None
        return rope.attention_factor

    assert factor() == pytest.approx(0.1 * math.log(4) + 1)
    assert factor(attention_factor=2.0) == 2.0
    assert factor(factor=0.5) == 1.0
    assert factor(mscale=2.0, mscale_all_dim=0.5) == pytest.approx((0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1))


def windows(kind: str, **changes: Any) -> list[int | None]:
    return [layer.window for layer in read(config(kind, **changes)).layers]


def test_windows() -> None:
    assert windows("mistral", sliding_window=None) == [None] * 4
    assert windows("mistral", sliding_window=9) == [9] * 4
    assert windows("mistral") == [4096] * 4
    for kind in ("qwen2", "qwen3"):
        assert windows(kind, sliding_window=9, max_window_layers=2) == [None] * 4
        assert windows(kind, sliding_window=9, max_window_layers=2, use_sliding_window=True) == [None, None, 9, 9]
        types = ["sliding_attention", "full_attention"] * 2
        assert windows(kind, sliding_window=9, use_sliding_window=True, layer_types=types) == [9, None, 9, None]
    assert windows("qwen3_moe", sliding_window=9, use_sliding_window=True) == [9] * 4
    assert windows("gemma2", sliding_window=9) == [9, None, 9, None]
    assert windows("gemma2", sliding_window=9, layer_types=["full_attention"] * 4) == [None] * 4


def test_sparse_layers() -> None:
    def sparse(**changes: Any) -> list[bool]:
        return [layer.experts is not None for layer in read(config("qwen3_moe", **changes)).layers]

    assert sparse() == [True] * 4
    assert sparse(decoder_sparse_step=2) == [False, True, False, True]
    assert sparse(mlp_only_layers=[0, 3]) == [False, True, True, False]


BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("vocab_size", "llama", {"vocab_size": ...}),
    ("vocab_size", "llama", {"vocab_size": 0}),
    ("vocab_size", "llama", {"vocab_size": "many"}),
    ("vocab_size", "llama", {"vocab_size": 10**12}),
    ("hidden_size", "llama", {"hidden_size": -4}),
    ("hidden_size", "llama", {"hidden_size": 32.5}),
    ("hidden_size", "llama", {"hidden_size": True}),
    ("intermediate_size", "llama", {"intermediate_size": None}),
    ("num_hidden_layers", "llama", {"num_hidden_layers": 10**9}),
    ("num_attention_heads", "llama", {"num_attention_heads": 5, "num_key_value_heads": 5}),
    ("num_key_value_heads", "llama", {"num_key_value_heads": 3}),
    ("head_dim", "llama", {"head_dim": 7}),
    ("max_position_embeddings", "llama", {"max_position_embeddings": 0}),
    ("rms_norm_eps", "llama", {"rms_norm_eps": float("nan")}),
    ("rms_norm_eps", "llama", {"rms_norm_eps": 0}),
    ("hidden_act", "llama", {"hidden_act": "relu6"}),
    ("tie_word_embeddings", "llama", {"tie_word_embeddings": "yes"}),
    ("attention_bias", "llama", {"attention_bias": 1}),
    ("rope_theta", "llama", {"rope_theta": -1.0}),
    ("rope_theta", "llama", {"rope_theta": 1.0}),
    ("partial_rotary_factor", "llama", {"partial_rotary_factor": 0.5}),
    ("rope_scaling", "llama", {"rope_scaling": "linear"}),
    ("rope_scaling.type", "llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("rope_parameters.rope_type", "llama", {"rope_parameters": {"rope_type": "longrope"}}),
    ("rope_parameters.factor", "llama", {"rope_parameters": {"rope_type": "linear"}}),
    ("rope_parameters.factor", "llama", {"rope_parameters": {"rope_type": "yarn", "factor": "x"}}),
    ("rope_parameters.low_freq_factor", "llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}),
    (
        "rope_parameters.high_freq_factor",
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 2.0}},
    ),
    ("rope_parameters.full_attention", "gemma2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
    ("sliding_window", "mistral", {"sliding_window": 0}),
    ("sliding_window", "qwen2", {"layer_types": ["sliding_attention"] * 4}),
    ("layer_types", "qwen2", {"layer_types": ["full_attention"] * 3}),
    ("layer_types", "gemma2", {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}),
    ("layer_types", "qwen3_moe", {"layer_types": ["full_attention"] * 4}),
    ("max_window_layers", "qwen2", {"use_sliding_window": True, "max_window_layers": -1}),
    ("query_pre_attn_scalar", "gemma2", {"query_pre_attn_scalar": 0}),
    ("attn_logit_softcapping", "gemma2", {"attn_logit_softcapping": -5.0}),
    ("use_bidirectional_attention", "gemma2", {"use_bidirectional_attention": True}),
    ("num_experts_per_tok", "qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 5}),
    ("num_experts", "qwen3_moe", {"num_experts": 10**8}),
    ("moe_intermediate_size", "qwen3_moe", {"moe_intermediate_size": 0}),
    ("mlp_only_layers", "qwen3_moe", {"mlp_only_layers": 3}),
    ("architectures", "llama", {"architectures": "LlamaForCausalLM"}),
]


@pytest.mark.parametrize(("key", "kind", "changes"), BAD)
def test_bad_values_are_named(key: str, kind: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {key}\b.*expected"):
        read(config(kind, **changes))


def test_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        read(config(architectures=["BloomForCausalLM"]))
    assert "BloomForCausalLM" in str(caught.value)
    for family in families().values():
        assert family.ARCHITECTURE in str(caught.value)
    with pytest.raises(ConfigError, match="rwkv"):
        read(config(architectures=..., model_type="rwkv"))


def test_quantized_is_refused_where_it_cannot_be_read() -> None:
    with pytest.raises(ConfigError, match="quantized with 'bitsandbytes'"):
        read(config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}))
    four = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    assert read(config(quantization_config=four)) == read(config())


def test_code_in_the_checkpoint_is_ignored(tmp_path: Path) -> None:
    """`auto_map` names Python files; they are there, and they are not run."""
    trap = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
    for name in ("modeling_trap.py", "configuration_trap.py"):
        (tmp_path / name).write_text(trap)
    auto_map = {"AutoConfig": "configuration_trap.C", "AutoModelForCausalLM": "modeling_trap.M"}
    (tmp_path / "config.json").write_text(json.dumps(config(auto_map=auto_map)))
    assert load_spec(tmp_path) == read(config())
    (tmp_path / "config.json").write_text(json.dumps(config(auto_map=auto_map, architectures=["TrapForCausalLM"])))
    with pytest.raises(ConfigError, match="TrapForCausalLM"):
        load_spec(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", "nul", "[" * 100_000, '{"a": NaN'])
def test_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path)


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path)


def test_checkpoint_dtype() -> None:
    assert checkpoint_dtype({"torch_dtype": "bfloat16"}) == "bfloat16"
    assert checkpoint_dtype({"dtype": "float16", "torch_dtype": "float32"}) == "float16"
    assert checkpoint_dtype({"dtype": "int8"}) is None
    assert checkpoint_dtype({}) is None


@pytest.mark.parametrize(
    ("name", "family", "millions"),
    [
        ("qwen2.5-0.5b", "qwen2", 494.03),
        ("llama-3.2-1b", "llama", 1235.81),
        ("qwen3-0.6b", "qwen3", 596.05),
        ("small-moe", "qwen3_moe", 1000.0),
    ],
)
def test_bench_shapes(name: str, family: str, millions: float) -> None:
    """The shapes have the parameter counts that the models are published with."""
    spec = load_spec(ROOT / "bench" / "shapes" / f"{name}.json")
    assert spec.family == family
    assert parameters(spec) / 1e6 == pytest.approx(millions, abs=0.01 if family != "qwen3_moe" else 100.0)


def test_specs_need_no_torch() -> None:
    code = (
        "import sys, weft.models, weft.models.layout, weft.models.spec\n"
        f"s = weft.models.load_spec({str(ROOT / 'bench' / 'shapes' / 'small-moe.json')!r})\n"
        "weft.models.spec.kv_groups(s, 'bfloat16'); weft.models.layout.weights_bytes(s, 'bfloat16')\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)
