"""`weft bench decode`: the record it prints, and the limit that it holds the engine to."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cli.running import weft
from weft.bench import decode
from weft.bench.decode import DecodeBench, find_shape, make_room, phase, ready
from weft.bench.limit import bytes_per_step, experts_hit, kv_bytes_read, read_gb_s, weight_bytes_read
from weft.cli.app import app
from weft.errors import CapacityError, ConfigError
from weft.exec.build import EngineConfig
from weft.models import load_config
from weft.models.families import read
from weft.models.layout import parameters
from weft.models.spec import kv_groups

KEYS = {
    "batch", "prefill_tok_s", "decode_tok_s", "ttft_s", "tpot_s", "ready_s", "rss_peak_bytes", "model", "dtype", "threads",
    "ops", "host_s_per_step", "limit",
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 320, "hidden_size": 32, "head_dim": 16,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
    "attention_bias": False, "eos_token_id": 0, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    path = tmp_path / "small-shape.json"
    path.write_text(json.dumps(QWEN3))
    return path


def test_the_real_command_prints_one_record_for_each_batch(shape: Path) -> None:
    how = ("--dtype", "bf16", "--batch", "1,3", "--prompt", "24", "--new", "6", "--threads", "1", "--json")
    done = weft("bench", "decode", "--shape", str(shape), *how)
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)
    assert [r["batch"] for r in records] == [1, 3]
    for r in records:
        assert r.keys() >= KEYS
        assert r["limit"].keys() == {"bytes_per_step", "read_gb_s", "fraction"}
        assert (r["model"], r["dtype"], r["threads"], r["ops"]) == ("small-shape", "bfloat16", 1, "cpu")
        assert r["steps"] == 5, "the first of six tokens belongs to the prompt"
        assert r["tpot_s"] * r["decode_tok_s"] == pytest.approx(r["batch"])
        assert 0 < r["host_s_per_step"] < r["tpot_s"]
        assert 0 < r["ttft_s"] < 60
        bound = r["limit"]["bytes_per_step"] / (r["limit"]["read_gb_s"] * 1e9)
        assert r["limit"]["fraction"] == pytest.approx(bound / r["tpot_s"])


def test_without_json_it_is_a_table(shape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "read_gb_s", lambda threads, device: 10.0)
    args = ["bench", "decode", "--shape", str(shape), "--batch", "2", "--prompt", "8", "--new", "3", "--threads", "1"]
    result = CliRunner().invoke(app, args, prog_name="weft")
    assert result.exit_code == 0, result.stderr
    assert "decode tok/s" in result.stdout
    assert "this machine reads 10.0 GB/s" in result.stdout


def test_phases_are_pure_and_every_sequence_gets_its_tokens() -> None:
    bench = DecodeBench(batches=[5], prompt=20, new=4)
    config = EngineConfig(model=QWEN3, load="random", threads=1, max_rows=32)
    runtime, ready_s = ready(make_room(config, bench))
    measured = phase(runtime, 5, bench, 0, count(1), lambda _: None)
    assert ready_s > 0
    assert len(measured.ttft_s) == 5
    assert max(measured.ttft_s) <= measured.prefill_s
    assert measured.ttft_s[0] < measured.ttft_s[-1], "100 prompt rows need several steps of 32"
    assert [tokens for _, tokens in measured.steps] == [5, 5, 5]
    phase(runtime, 5, bench, 0, count(6), lambda _: None)
    assert runtime.engine.stats.generation_tokens == 40
    assert runtime.engine.stats.prompt_tokens == 200, "the same prompts once more are computed once more"
    assert runtime.engine.stats.preemptions == 0
    assert runtime.engine.stats.kv_blocks_referenced == 0


def test_tokens_are_drawn_from_the_law_that_is_asked_for() -> None:
    greedy = DecodeBench(batches=[2], prompt=20, new=12)
    runtime, _ = ready(make_room(EngineConfig(model=QWEN3, load="random", threads=1), greedy))
    hot, narrow = (replace(greedy, temperature=5.0, top_p=top_p) for top_p in (1.0, 1e-9))
    plain, drawn, cut = (
        list(phase(runtime, 2, bench, 0, count(first), lambda _: None).tokens.values())
        for first, bench in ((1, greedy), (11, hot), (21, narrow))
    )
    assert drawn != plain
    assert cut == plain, "no other token is left"
    for wrong in ({"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ConfigError, match=r"--temperature|--top-p"):
            DecodeBench(batches=[1], **wrong)  # type: ignore[arg-type]


def test_room_is_made_for_the_largest_batch_at_once() -> None:
    config = EngineConfig(model=QWEN3, load="random", threads=1)
    setup = make_room(config, DecodeBench(batches=[1, 7], prompt=100, new=28))
    assert setup.limits.max_num_seqs == 7
    assert setup.limits.max_model_len == 128
    assert setup.plan.kv_blocks >= 7 * 128 // setup.plan.block_tokens
    with pytest.raises(CapacityError, match="5000000 sequences"):
        make_room(config, DecodeBench(batches=[5_000_000], prompt=100, new=28))
    with pytest.raises(ConfigError, match="context is 512"):
        make_room(config, DecodeBench(batches=[1], prompt=500, new=64))


def test_shapes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: Path) -> None:
    monkeypatch.setattr(decode, "SHAPES", tmp_path)
    assert find_shape("small-shape") == shape
    assert find_shape(str(shape)) == shape
    with pytest.raises(ConfigError, match=r"there are small-shape"):
        find_shape("small-shap")
    with pytest.raises(ConfigError, match="no file"):
        find_shape("other.json")


# ---------------------------------------------------------------------------------------------- the limit


def changed(**keys: Any) -> dict[str, Any]:
    return {**QWEN3, **keys}


def test_weights_are_read_once_and_of_an_untied_embedding_only_the_rows() -> None:
    tied, untied = read(QWEN3), read(changed(tie_word_embeddings=False))
    assert weight_bytes_read(tied, "bfloat16", 4) == 2 * parameters(tied)
    assert weight_bytes_read(tied, "float32", 1) == 4 * parameters(tied)
    assert weight_bytes_read(untied, "bfloat16", 4) == 2 * (parameters(untied) - 320 * 32 + 4 * 32)


def test_of_experts_only_those_that_are_hit_count() -> None:
    keys = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True,
            "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip
    spec = read(changed(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", **keys))
    one_expert = 3 * 16 * 32
    everything = parameters(spec)
    assert weight_bytes_read(spec, "bfloat16", 1) == 2 * (everything - 2 * 6 * one_expert)
    assert experts_hit(8, 2, 1) == pytest.approx(2)
    assert experts_hit(8, 2, 2) == pytest.approx(2 + 2 * 6 / 8)
    assert weight_bytes_read(spec, "bfloat16", 200) == pytest.approx(2 * everything, rel=1e-6)


def test_kv_is_read_for_every_sequence_and_through_windows() -> None:
    spec = read(QWEN3)
    groups, _ = kv_groups(spec, "bfloat16")
    entry = 2 * 2 * 2 * 16 * 2  # layers, key and value, kv heads, head_dim, bytes
    assert kv_bytes_read(groups, 3, 100) == 3 * 100 * entry
    assert bytes_per_step(spec, groups, "bfloat16", 3, 100) == weight_bytes_read(spec, "bfloat16", 3) + 300 * entry
    narrow = read(changed(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=10))
    groups, _ = kv_groups(narrow, "bfloat16")
    assert kv_bytes_read(groups, 3, 100) == 3 * 10 * entry


def test_bandwidth_is_that_of_memory_and_leaves_threads_alone() -> None:
    import torch

    before = torch.get_num_threads()
    assert 0.2 < read_gb_s(1, size_bytes=1 << 26) < 5000
    assert torch.get_num_threads() == before


def test_the_bundled_shape_agrees_with_its_plan(bundled: Path) -> None:
    spec = read(load_config(bundled))
    assert weight_bytes_read(spec, "float32", 1) <= 4 * parameters(spec)
