"""Checkpoints of few bits against what the packages that wrote them read back, and files and configs that cannot be.

tests/models/packed/make.py made the checkpoints, with autoawq, auto-gptq, gptqmodel and compressed-tensors.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from weft.errors import ConfigError
from weft.models.checkpoints.files import Files
from weft.models.checkpoints.readers import Reader, fused, readers
from weft.models.checkpoints.scheme import scheme
from weft.models.checkpoints.stored import catalogue
from weft.models.checkpoints.unpack import packed, unpacked, whole
from weft.models.families import families
from weft.models.families._config import Config
from weft.models.formats import WeightFormat
from weft.models.quantized import Quantized

PACKED = Path(__file__).parent / "packed"
FORMATS = {
    "awq": "int4:32:zero",
    "gptq": "int4:32:float",
    "gptq-zeros": "int4:64:zero",
    "gptq-8": "int8",
    "gptq-v2": "int4:32:zero",
    "packed": "int4:32:float",
    "packed-zeros": "int4:16:zero",
    "packed-rows": "int4:0:zero",
    "packed-8": "int8",
    "bytes": "int8",
}
UP = "model.layers.0.mlp.up_proj"


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf8"))
    return found


def look(folder: Path) -> tuple[dict[str, Reader], Files]:
    config = config_of(folder)
    family = families()["llama"]
    stored = catalogue(folder)
    found = readers(folder, list(family.parts(family.spec(Config(config)))), stored, scheme(config))
    return found, Files(stored)


def read_all(folder: Path) -> dict[str, Any]:
    found, files = look(folder)
    with files:
        return {name: reader.read(files.get) for name, reader in found.items()}


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint whose config and tensors a function has changed."""

    def make(
        name: str,
        config: Callable[[dict[str, Any]], None] | None = None,
        tensors: Callable[[dict[str, torch.Tensor]], None] | None = None,
    ) -> Path:
        values, stored = config_of(PACKED / name), load_file(PACKED / name / "model.safetensors")
        if config is not None:
            config(values["quantization_config"])
        if tensors is not None:
            tensors(stored)
        (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf8")
        save_file({key: value.contiguous() for key, value in stored.items()}, tmp_path / "model.safetensors")
        return tmp_path

    return make


# ---------------------------------------------------------------------------------------------- what the packages read


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_of_the_package(name: str) -> None:
    """Values, scales and zeros are exactly the package's: scale * (value - zero), rounded as it rounds, is its own weight.

    Scale * zero as float16 is within a 2048th of itself.
    """
    expected = load_file(PACKED / name / "expected.safetensors")
    found = read_all(PACKED / name)
    form = WeightFormat.parse(FORMATS[name])
    assert expected
    assert {key for key, value in found.items() if isinstance(value, Quantized)} == set(expected)
    for key, theirs in expected.items():
        mine = found[key]
        assert mine.format == form
        scales = mine.scales.float() * mine.unit
        half = float(form.levels // 2)
        offsets = None if mine.offsets is None else mine.offsets.float() * mine.unit
        zeros = torch.full_like(scales, half) if offsets is None else (-offsets / scales).round()
        values = mine.values.view(*scales.shape, -1).float()
        exact = ((values - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).view_as(theirs)
        assert torch.equal(exact.to(theirs.dtype), theirs), key
        slack = (zeros * scales.abs() / 2048).unsqueeze(-1) if offsets is not None else torch.zeros(())
        error = (mine.dequantized() - exact).abs().view(*scales.shape, -1)
        assert bool((error <= slack + 1e-6 * scales.abs().unsqueeze(-1)).all()), key


@pytest.mark.parametrize("name", FORMATS)
def test_the_rest_is_dense(name: str) -> None:
    stored = load_file(PACKED / name / "model.safetensors")
    for key, value in read_all(PACKED / name).items():
        if not isinstance(value, Quantized):
            assert value.is_floating_point()
            assert torch.equal(value, stored[key])
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(read_all(PACKED / name)[norm], stored[norm])


@pytest.mark.parametrize("name", FORMATS)
def test_every_stored_tensor_is_read(name: str) -> None:
    found, files = look(PACKED / name)
    assert {tensor for reader in found.values() for tensor in reader.names} == set(files.stored)


def test_fused_formats_hold_every_part(damaged: Callable[..., Path]) -> None:
    found, _ = look(PACKED / "packed-zeros")
    formats = fused(found)
    assert set(formats) == {"0.qkv", "0.out", "0.gate_up", "0.down"}
    assert set(formats.values()) == {WeightFormat(4, 16, False)}

    def one_dense(tensors: dict[str, torch.Tensor]) -> None:
        for tail in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"):
            del tensors[f"{UP}.{tail}"]
        tensors[f"{UP}.weight"] = torch.ones(128, 64)

    folder = damaged("packed-zeros", tensors=one_dense)
    assert set(fused(look(folder)[0])) == {"0.qkv", "0.out", "0.down"}
    assert torch.equal(read_all(folder)[f"{UP}.weight"], torch.ones(128, 64))


def test_a_layer_may_lie_in_several_files(tmp_path: Path) -> None:
    stored = load_file(PACKED / "awq" / "model.safetensors")
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for key, value in stored.items():
        shards[key.endswith("scales")][key] = value
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, tmp_path / file)
    index = {"weight_map": {key: files[key.endswith("scales")] for key in stored}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf8")
    (tmp_path / "config.json").write_bytes((PACKED / "awq" / "config.json").read_bytes())
    for key, value in read_all(PACKED / "awq").items():
        other = read_all(tmp_path)[key]
        if isinstance(value, Quantized):
            value, other = value.dequantized(), other.dequantized()
        assert torch.equal(value, other)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [1, 7, 8, 64, 100])
def test_packing_is_undone(bits: int, width: int) -> None:
    values = torch.randint(0, 1 << bits, (5, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))
    words = packed(values, bits)
    assert words.dtype is torch.int32
    assert words.shape == (5, -(-width * bits // 32))
    assert torch.equal(unpacked(words, bits)[:, :width], values)
    column = values.repeat(8, 1)[:, :1].t()  # one row whose values lie apart
    assert torch.equal(unpacked(packed(column, bits), bits), column)
    assert torch.equal(unpacked(words[:, :1].t().contiguous().t(), bits), unpacked(words, bits)[:, : 32 // bits])


def test_larger_groups_repeat_their_scales() -> None:
    """Groups of 256 inputs, as groups of 128 with equal scales."""
    entry = {"quant_method": "gptq", "bits": 4, "group_size": 256, "desc_act": False}
    found = scheme({"quantization_config": entry})
    assert found is not None
    form = found.format("model.layers.0.mlp.up_proj")
    assert form == WeightFormat(4, 128)
    values = torch.randint(0, 16, (2, 512), dtype=torch.uint8)
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    mine = whole(values, scales, None, form, "x").dequantized()
    assert torch.equal(mine, (values.float() - 8) * scales.repeat_interleave(256, 1))


# ---------------------------------------------------------------------------------------------- act-order


def test_act_order_is_refused_by_config() -> None:
    with pytest.raises(ConfigError, match=r"desc_act.*act-order"):
        read_all(PACKED / "gptq-act-order")


def test_act_order_is_refused_by_what_the_file_holds(damaged: Callable[..., Path]) -> None:
    """A config that hides it: the groups of inputs themselves are out of order."""
    folder = damaged("gptq-act-order", config=lambda entry: entry.update(desc_act=False))
    with pytest.raises(ConfigError, match="g_idx parts the inputs into groups out of their order"):
        read_all(folder)


def test_act_order_with_groups_in_order_is_read(damaged: Callable[..., Path]) -> None:
    folder = damaged("gptq", config=lambda entry: entry.update(desc_act=True, static_groups=True))
    assert isinstance(read_all(folder)[f"{UP}.weight"], Quantized)


# ---------------------------------------------------------------------------------------------- configs that cannot be


def compressed_weights(entry: dict[str, Any]) -> Any:
    return entry["config_groups"]["group_0"]["weights"]


EIGHT = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
REFUSED: list[tuple[str, str, Callable[[dict[str, Any]], Any], str]] = [
    ("method", "awq", lambda e: e.update(quant_method="bitsandbytes"), "'bitsandbytes'.*it reads awq, gptq"),
    ("method object", "awq", lambda e: e.update(quant_method={"a": 1}), "quant_method"),
    ("awq bits", "awq", lambda e: e.update(bits=3), "bits is 3; expected 4"),
    ("awq bits true", "awq", lambda e: e.update(bits=True), "bits is True"),
    ("awq group", "awq", lambda e: e.update(group_size=24), "group_size is 24; expected -1 or a multiple of 16"),
    ("awq group none", "awq", lambda e: e.pop("group_size"), "group_size is missing"),
    ("awq version", "awq", lambda e: e.update(version="gemv"), "version is 'gemv'; expected gemm"),
    ("awq symmetric", "awq", lambda e: e.update(zero_point=False), "zero_point is False"),
    ("awq names", "awq", lambda e: e.update(modules_to_not_convert="lm_head"), "must be a list"),
    ("awq ignored", "awq", lambda e: e.update(modules_to_not_convert=["up_proj"]), "up_proj in few bits, though"),
    ("gptq bits", "gptq", lambda e: e.update(bits=2), "bits is 2; expected 4 or 8"),
    ("gptq layout", "gptq", lambda e: e.update(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
    ("gptq marlin", "gptq", lambda e: e.update(is_marlin_format=True), "is_marlin_format"),
    ("gptq words", "gptq", lambda e: e.update(pack_dtype="int16"), "pack_dtype is 'int16'"),
    ("gptq sym", "gptq-zeros", lambda e: e.update(sym=True), "says that it is symmetric"),
    ("gptq wrong group", "gptq", lambda e: e.update(group_size=64), "scales of shape .*asks for"),
    ("gptq wrong bits", "gptq", lambda e: e.update(bits=8), "qweight of shape"),
    ("kv cache", "packed", lambda e: e.update(kv_cache_scheme=EIGHT), "kv_cache_scheme asks"),
    ("sparsity", "packed", lambda e: e.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config asks"),
    ("rotations", "packed", lambda e: e.update(transform_config={"config_groups": {"u": 1}}), "transform_config asks"),
    ("status", "packed", lambda e: e.update(quantization_status="frozen"), "quantization_status is 'frozen'"),
    ("no groups", "packed", lambda e: e.update(config_groups={}), "config_groups"),
    ("group of text", "packed", lambda e: e.update(config_groups={"W4A16": ["Linear"]}), "W4A16"),
    (
        "activations",
        "packed",
        lambda e: e["config_groups"]["group_0"].update(input_activations=EIGHT),
        "input_activations quantizes activations",
    ),
    ("layout", "packed", lambda e: e["config_groups"]["group_0"].update(format="marlin-24"), "format is 'marlin-24'"),
    ("float", "packed", lambda e: compressed_weights(e).update(type="float"), "type is 'float'; expected int"),
    ("bits", "packed", lambda e: compressed_weights(e).update(num_bits=6), "num_bits is 6"),
    ("block", "packed", lambda e: compressed_weights(e).update(strategy="block"), "strategy is 'block'"),
    ("actorder", "packed", lambda e: compressed_weights(e).update(actorder="group"), "actorder is 'group'"),
    ("dynamic", "packed", lambda e: compressed_weights(e).update(dynamic=True), "dynamic is True"),
    ("asymmetric", "packed", lambda e: compressed_weights(e).update(symmetric=False), "lacks .*weight_zero_point"),
    ("ignored", "packed", lambda e: e.update(ignore=["re:.*gate_proj"]), "gate_proj in few bits, though"),
    ("untargeted", "packed", lambda e: e["config_groups"]["group_0"].update(targets=["re:.*mlp.*"]), "in few bits"),
    ("pattern", "packed", lambda e: e.update(ignore=["re:(("]), "is no pattern"),
    ("slow pattern", "packed", lambda e: e.update(ignore=["re:(.*a)*b"]), "could take long"),
    ("slow pattern 2", "packed", lambda e: e.update(ignore=["re:" + "(.?)(?:x|y)" * 9 + "(a|a)+$"]), "could take long"),
    ("many repeats", "packed", lambda e: e.update(ignore=["re:.*.*.*.*.*b"]), "could take long"),
    ("back reference", "packed", lambda e: e.update(ignore=["re:(a)\\1"]), "could take long"),
    ("long pattern", "packed", lambda e: e.update(ignore=["re:" + "a" * 300]), "could take long"),
]


@pytest.mark.parametrize(("name", "change", "words"), [pytest.param(*c[1:], id=c[0]) for c in REFUSED])
def test_what_cannot_be_honoured_is_refused(name: str, change: Any, words: str, damaged: Callable[..., Path]) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match=words):
        read_all(damaged(name, config=change))
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("value", ["awq", 7, ["awq"]])
def test_an_entry_that_is_no_object_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="quantization_config"):
        scheme({"quantization_config": value})


def test_lists_of_layers_are_honoured() -> None:
    entry = config_of(PACKED / "packed")["quantization_config"]
    entry["ignore"] = ["lm_head", "re:.*gate_proj$", "model.layers.1"]
    found = scheme({"quantization_config": entry})
    assert found is not None
    assert found.format("model.layers.0.mlp.up_proj") == WeightFormat(4, 32)
    for dense in ("lm_head", "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.up_proj"):
        assert found.format(dense) is None
    assert found.format("model.layers.10.mlp.up_proj") == WeightFormat(4, 32)
    assert found.format("model.embed_tokens", "Embedding") is None


def test_layers_may_have_numbers_of_their_own() -> None:
    entry = copy.deepcopy(config_of(PACKED / "gptq-v2")["quantization_config"])
    entry["dynamic"] = {"+:.*\\.0\\..*": {"bits": 8, "group_size": 64}, "-:.*\\.1\\..*": {}}
    found = scheme({"quantization_config": entry})
    assert found is not None
    assert found.format("model.layers.0.mlp.up_proj") == WeightFormat(8, 64, False)
    assert found.format("model.layers.2.mlp.up_proj") == WeightFormat(4, 32, False)


# ---------------------------------------------------------------------------------------------- files that cannot be


def put(tail: str, value: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if value is None:
            del tensors[f"{UP}.{tail}"]
        else:
            tensors[f"{UP}.{tail}"] = value

    return change


INT = torch.int32
DAMAGED: list[tuple[str, str, Callable[[dict[str, torch.Tensor]], None], str]] = [
    ("no scales", "awq", put("scales", None), "lacks .*up_proj.scales"),
    ("no zeros", "awq", put("qzeros", None), "lacks .*up_proj.qzeros"),
    ("no weight at all", "awq", put("qweight", None), "lacks .*up_proj.weight"),
    ("few rows", "awq", put("qweight", torch.zeros(63, 16, dtype=INT)), "qweight of shape .63, 16."),
    ("float words", "awq", put("qweight", torch.zeros(64, 16)), "qweight in another number format than int32"),
    ("whole scales", "awq", put("scales", torch.ones(2, 128, dtype=INT)), "scales in another number format"),
    ("other groups", "awq", put("scales", torch.ones(3, 128)), "scales of shape"),
    ("other zeros", "awq", put("qzeros", torch.zeros(1, 16, dtype=INT)), "qzeros of shape"),
    ("infinite", "awq", put("scales", torch.full((2, 128), torch.inf)), "not all finite"),
    ("enormous", "awq", put("scales", torch.full((2, 128), 1e38)), "exceed anything"),
    ("twice", "awq", put("weight", torch.zeros(128, 64)), "both dense and packed"),
    ("short order", "gptq", put("g_idx", torch.zeros(63, dtype=INT)), "g_idx of shape"),
    ("order of one", "gptq", put("g_idx", torch.zeros(64, dtype=INT)), "out of their order"),
    ("negative order", "gptq", put("g_idx", torch.full((64,), -1, dtype=INT)), "out of their order"),
    ("no shape", "packed", put("weight_shape", None), "lacks .*weight_shape"),
    ("other shape", "packed", put("weight_shape", torch.tensor([64, 128])), "weight_shape is not"),
    ("act-order", "packed", put("weight_g_idx", torch.zeros(64, dtype=INT)), "weight_g_idx: groups out of their order"),
    ("vector", "packed", put("weight_scale", torch.ones(128)), "weight_scale of shape"),
    ("bytes' shape", "bytes", put("weight", torch.zeros(64, 128, dtype=torch.int8)), "weight of shape"),
]


@pytest.mark.parametrize(("name", "change", "words"), [pytest.param(*c[1:], id=c[0]) for c in DAMAGED])
def test_damaged_files_are_refused(name: str, change: Any, words: str, damaged: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=words):
        read_all(damaged(name, tensors=change))
