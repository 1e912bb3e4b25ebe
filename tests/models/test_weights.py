"""Loading: exact bytes, strict comparison with the config, shards, and files that are damaged or hostile."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
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
from weft.models.checkpoints import readers
from weft.models.decoder import build
from weft.models.layout import PAD_ROWS, parameters, weights_bytes, workspace_bytes
from weft.models.spec import DecoderSpec, kv_groups
from weft.models.weights import dense

ROOT = Path(__file__).resolve().parents[2]


def load(spec: DecoderSpec, folder: Path, **kw: Any) -> Any:
    groups, _ = kv_groups(spec, "float32")
    return build(spec, folder, dtype="float32", max_rows=8, max_samples=8, groups=groups, invariant=False, **kw)


@pytest.fixture
def tensors(checkpoint: Callable[[str], Checkpoint]) -> dict[str, torch.Tensor]:
    return load_file(checkpoint("llama").folder / "model.safetensors")


@pytest.fixture
def spec(checkpoint: Callable[[str], Checkpoint]) -> DecoderSpec:
    return load_spec(checkpoint("llama").folder)


def test_bytes_are_exact(checkpoint: Callable[[str], Checkpoint]) -> None:
    for name in ("llama_bias_tied", "gemma2", "qwen3_moe"):
        reference = checkpoint(name)
        spec = load_spec(reference.folder)
        assert parameters(spec) == sum(p.numel() for p in reference.model.parameters())
        for dtype in ("float32", "bfloat16"):
            groups, _ = kv_groups(spec, dtype)
            decoder = build(spec, reference.folder, dtype=dtype, max_rows=70, max_samples=3, groups=groups)
            assert decoder.weights_bytes == weights_bytes(spec, dtype)
            assert decoder.workspace_bytes == workspace_bytes(spec, dtype, 70, 3)
            lengths = {buffer.shape[0] for buffer in decoder._buffers.values()}
            assert lengths == {PAD_ROWS, 2 * PAD_ROWS}


def test_progress_ends_at_the_total(spec: DecoderSpec, checkpoint: Callable[[str], Checkpoint]) -> None:
    for source in (checkpoint("llama").folder, "random"):
        seen: list[tuple[int, int]] = []
        load(spec, source, progress=lambda *numbers, seen=seen: seen.append(numbers))  # type: ignore[arg-type]
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1] == parameters(spec) * 4


def shard(folder: Path, tensors: dict[str, torch.Tensor], cut: int = 9) -> None:
    names = sorted(tensors)
    places = {name: f"model-0000{1 + (i >= cut)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards_give_the_same_weights(
    tmp_path: Path, spec: DecoderSpec, tensors: dict[str, torch.Tensor], checkpoint: Callable[[str], Checkpoint]
) -> None:
    shard(tmp_path, tensors)
    one, many = load(spec, checkpoint("llama").folder), load(spec, tmp_path)
    assert all(torch.equal(one.tensors[name], many.tensors[name]) for name in one.tensors)


def test_other_number_formats_are_converted(
    tmp_path: Path, spec: DecoderSpec, tensors: dict[str, torch.Tensor]
) -> None:
    save_file(
        {name: t.to(torch.bfloat16 if "mlp" in name else torch.float64) for name, t in tensors.items()},
        tmp_path / "model.safetensors",
    )
    found = load(spec, tmp_path).tensors
    assert torch.equal(found["1.down"], tensors["model.layers.1.mlp.down_proj.weight"].bfloat16().float())
    assert torch.equal(found["norm"], tensors["model.norm.weight"])


def test_values_off_their_alignment(tmp_path: Path, spec: DecoderSpec, tensors: dict[str, torch.Tensor]) -> None:
    """A header of odd length puts every value at an odd address."""
    save_file(tensors, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + size].rstrip()
    header += b" " * (1 - len(header) % 2)
    header += b" " if len(header) % 2 == 0 else b""
    assert len(header) % 2
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
    found = load(spec, tmp_path).tensors
    assert torch.equal(found["head"], tensors["lm_head.weight"])


@pytest.mark.usefixtures("ops")
def test_leftovers_that_mean_nothing_are_allowed(tmp_path: Path, checkpoint: Callable[[str], Checkpoint]) -> None:
    """Old checkpoints store rope frequencies; some with tied embeddings store the projection a second time."""
    reference = checkpoint("llama_bias_tied")
    tensors = load_file(reference.folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    bench = bench_for(load_spec(reference.folder), tmp_path)
    tokens = prompt(1, 20)
    assert (bench.run([Rows("a", tokens, 0)])[0] - reference.logits(tokens)).abs().max() < TOLERANCE


# ---------------------------------------------------------------------------------------------- what is refused


def test_missing_unexpected_and_misshapen(tmp_path: Path, spec: DecoderSpec, tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for change, match in (
        ({name: None}, f"lacks {name}, which"),
        ({"model.layers.9.extra.weight": torch.ones(2)}, r"has model\.layers\.9\.extra\.weight, of which"),
        ({name: tensors[name].T.contiguous()}, rf"shape of {name} \[48, 80\] instead of \[80, 48\]"),
        ({name: tensors[name].to(torch.int8)}, f"stores {name} in a number format"),
    ):
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ConfigError, match=match):
            load(spec, tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="and 24 more"):
        load(spec, tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"has model\.layers\.1\..* and 12 more, of which"):
        load(replace(spec, layers=spec.layers[:1]), tmp_path)
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.3\."):
        load(replace(spec, layers=(*spec.layers, replace(spec.layers[0], weights=3))), tmp_path)


def header_with(entry: dict[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(entry).encode()
    return struct.pack("<Q", len(text)) + text + body


HOSTILE = {
    "empty": b"",
    "short": b"\x10\x00",
    "not_json": struct.pack("<Q", 4) + b"abcd",
    "huge_header": struct.pack("<Q", 1 << 62) + b"{}",
    "header_past_the_end": struct.pack("<Q", 5000) + b"{}",
    "offsets_past_the_end": header_with({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
    "negative_offset": header_with({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, b"\0" * 8),
    "shape_is_larger": header_with({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]}}, b"\0" * 8),
    "shape_overflows": header_with({"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}}),
    "overlap": header_with(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        },
        b"\0" * 8,
    ),
    "pickle": b"\x80\x04\x95\x00\x00\x00\x00",
    "deep": struct.pack("<Q", 100_000) + b"[" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, tmp_path: Path, spec: DecoderSpec) -> None:
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        load(spec, tmp_path)


def test_truncated_at_any_point(tmp_path: Path, spec: DecoderSpec, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    for keep in (7, 8, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "model.safetensors").write_bytes(data[:keep])
        with pytest.raises(ConfigError, match="not a whole safetensors file"):
            load(spec, tmp_path)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..\\m.safetensors", "model.bin", ".."]
)
def test_shards_stay_in_the_folder(
    file: str, tmp_path: Path, spec: DecoderSpec, tensors: dict[str, torch.Tensor]
) -> None:
    inner = tmp_path / "inner"
    (inner / "sub").mkdir(parents=True)
    for place in (tmp_path, inner / "sub"):
        save_file(tensors, place / "model.safetensors")
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}))
    with pytest.raises(ConfigError, match="not the name of a safetensors file in the same folder"):
        load(spec, inner)


def test_a_tensor_that_stands_there_twice(tmp_path: Path, spec: DecoderSpec) -> None:
    """Of two entries under one name a reader takes the first and another the last: what is checked must be what is read."""
    entry = b'{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}'
    text = b'{"a":' + entry % (0, 8) + b',"b":' + entry % (8, 16) + b',"a":' + entry % (0, 8) + b"}"
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(ConfigError, match="'a' stands there twice"):
        load(spec, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
    )
    with pytest.raises(ConfigError, match="'a' stands there twice"):
        load(spec, tmp_path)


@pytest.mark.parametrize("index", ["[]", "{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "null"])
def test_bad_index(index: str, tmp_path: Path, spec: DecoderSpec) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match=r"index\.json"):
        load(spec, tmp_path)


def test_missing_shard_and_misplaced_tensor(
    tmp_path: Path, spec: DecoderSpec, tensors: dict[str, torch.Tensor]
) -> None:
    shard(tmp_path, tensors)
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**places, "lm_head.weight": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(ConfigError, match=r"places lm_head\.weight"):
        load(spec, tmp_path)
    index.write_text(json.dumps({"weight_map": places}))
    os.unlink(tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ConfigError, match="does not exist"):
        load(spec, tmp_path)


def test_pickle_files_are_never_opened(tmp_path: Path, spec: DecoderSpec) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(ConfigError, match="convert them to safetensors"):
        load(spec, tmp_path)
    os.unlink(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="neither"):
        load(spec, tmp_path)


# ---------------------------------------------------------------------------------------------- random weights


@pytest.mark.usefixtures("ops")
def test_random_weights_are_reproducible_and_ordinary(checkpoint: Callable[[str], Checkpoint]) -> None:
    for name in ("llama_bias_tied", "gemma2", "qwen3_moe"):
        spec = load_spec(checkpoint(name).folder)
        one, again, other = (bench_for(spec, "random", seed=seed, invariant=False) for seed in (5, 5, 6))
        tokens = prompt(2, 50)
        logits = [bench.run([Rows("a", tokens, 0)])[0] for bench in (one, again, other)]
        assert torch.equal(logits[0], logits[1])
        assert not torch.equal(logits[0], logits[2])
        assert 0.2 < float(logits[0].std()) < 5.0
        assert logits[0].isfinite().all()


def test_windows_are_put_together(
    tmp_path: Path, spec: DecoderSpec, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few rows at a time, also of a number format that is converted, and of values off their alignment."""
    save_file({name: t.half() if "mlp" in name else t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    wanted = load(spec, tmp_path).tensors
    monkeypatch.setattr(readers, "DENSE_WINDOW", 200)
    seen: list[tuple[int, int]] = []
    found = load(spec, tmp_path, progress=lambda *numbers: seen.append(numbers)).tensors
    assert len(seen) > 3 * len(tensors)
    assert seen[-1][0] == seen[-1][1]
    for name, tensor in wanted.items():
        assert torch.equal(dense(found[name]), dense(tensor)), name


@pytest.mark.serial
def test_loading_peaks_at_the_weights(tmp_path: Path) -> None:
    """A 240 MB checkpoint: the process never holds it twice, nor its largest tensor."""
    code = f"""
import sys, json, torch
from pathlib import Path
from safetensors.torch import save_file
from weft.exec.host import peak_rss_bytes  # getrusage tells of the process before exec, too
from weft.models import load_spec
from weft.models.families import families
from weft.models.weights import allocate, load
folder = Path({str(tmp_path)!r})
config = dict(architectures=["LlamaForCausalLM"], vocab_size=20000, hidden_size=1024, intermediate_size=4096,
              num_hidden_layers=2, num_attention_heads=8, max_position_embeddings=64, tie_word_embeddings=True)
(folder / "config.json").write_text(json.dumps(config))
spec = load_spec(folder)
if sys.argv[1] == "write":
    tensors = {{p.name: torch.ones(p.shape) for p in families()["llama"].parts(spec)}}
    last = "model.embed_tokens.weight"  # the largest, when all else is there
    places = {{name: f"model-0000{{1 + (name == last)}}-of-00002.safetensors" for name in tensors}}
    for file in set(places.values()):
        save_file({{name: t for name, t in tensors.items() if places[name] == file}}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({{"weight_map": places}}))
else:
    memory, views = allocate(spec, torch.float32, torch.device("cpu"))
    before = peak_rss_bytes()
    load(folder, spec, views)
    after = peak_rss_bytes()
    largest = max(p.shape[0] * p.shape[1] * 4 for p in families()["llama"].parts(spec) if len(p.shape) > 1)
    print(after - before, memory.nbytes, largest)
"""
    run = [sys.executable, "-c", code]
    subprocess.run([*run, "write"], check=True, timeout=120, cwd=ROOT)
    done = subprocess.run([*run, "read"], check=True, timeout=120, cwd=ROOT, capture_output=True, text=True)
    grown, weights, largest = map(int, done.stdout.split())
    assert weights > 200 << 20
    assert largest > 64 << 20
    assert grown < weights + (40 << 20)
