"""Whole models from GGUF: the reference implementation's logits, the safetensors checkpoint's tokens, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.gguf.forge import ARRAY, F32, STRING, U32, Forge, model
from tests.gguf.kquants import mixed
from tests.models import checkpoints
from tests.models.harness import Rows, bench_for
from tests.models.test_parity import TOLERANCE, prompt
from tools.to_gguf import write
from weft import LLM, SamplingParams
from weft.errors import ConfigError
from weft.models import load_config, load_spec, weights
from weft.models.checkpoints import readers
from weft.models.gguf.blocks import dequantized, quantized
from weft.models.gguf.checkpoint import catalogue
from weft.models.spec import DecoderSpec

gguf = pytest.importorskip("gguf")

YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32,
    "beta_fast": 8.0, "beta_slow": 1.0,
}  # fmt: skip
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": ("llama", {"rope_parameters": YARN}),
    "moe": ("qwen3_moe", dict(norm_topk_prob=True, **checkpoints.MOE)),
}
PLAIN = ["llama", "llama_bias_tied", "llama_linear", "llama3", "mistral", "mistral_full", "qwen2", "qwen3"]
FAMILIES = {"mistral_full": "llama", "yarn": "llama", "moe": "qwen3_moe"}
"""Where the family that weft finds is not the name's beginning: nothing in GGUF tells Mistral from Llama but a window."""


def made(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> checkpoints.Checkpoint:
    monkeypatch.setattr(checkpoints, "VARIANTS", {**checkpoints.VARIANTS, **MORE})
    return checkpoints.make(name, folder)


@pytest.mark.parametrize("name", [*PLAIN, *MORE])
def test_logits_of_every_family(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers made and saved the model, the gguf package wrote it, and both numbers agree at every position."""
    reference = made(name, tmp_path / "hf", monkeypatch)
    path = tmp_path / "x.gguf"
    write(reference.folder, path)
    spec = load_spec(path)
    assert spec.family == FAMILIES.get(
        name, name.split("_")[0].rstrip("3") if name.startswith("llama") else name.split("_")[0]
    )
    tokens = prompt(3)
    logits = bench_for(spec, path, invariant=False, slide=False).run([Rows("a", tokens, 0)])[0]
    assert (logits - reference.logits(tokens)).abs().max() < TOLERANCE


def same_weights(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def loaded(spec: DecoderSpec, path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    _, tensors = weights.allocate(spec, dtype, torch.device("cpu"))
    weights.load(path, spec, tensors)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_equal_the_safetensors_ones(
    bundled: Path, bundled_gguf: Callable[..., Path], dtype: torch.dtype
) -> None:
    """To the last bit: the checkpoint is bfloat16, which F32 and BF16 hold."""
    spec = load_spec(bundled)
    want = loaded(spec, bundled, dtype)
    for kind in ("F32", "BF16"):
        assert same_weights(loaded(load_spec(bundled_gguf(kind)), bundled_gguf(kind), dtype), want)


CASES = [
    ("F16", 1),
    ("Q8_0", 1),
    ("Q8_0", 1 << 20),
    ("Q4_0", 5000),
    ("Q4_1", 1 << 20),
    ("Q5_0", 1 << 20),
    ("Q5_1", 1 << 20),
]


@pytest.mark.parametrize(("kind", "window"), CASES)
def test_quantized_weights_are_those_of_the_gguf_package(
    kind: str, window: int, bundled_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row (head by head where rows are in pairs), some rows, or all at once."""
    monkeypatch.setattr(readers, "WINDOW", window)
    path = bundled_gguf(kind)
    spec = load_spec(path)
    found = loaded(spec, path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def theirs(name: str) -> np.ndarray:
        return gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)

    assert np.array_equal(found["embed"], theirs("token_embd.weight"))
    assert np.array_equal(found["3.down"], theirs("blk.3.ffn_down.weight"))
    rows = theirs("blk.2.attn_q.weight").reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256)
    assert np.array_equal(found["2.qkv"][:256], rows)
    rows = theirs("blk.2.attn_k.weight").reshape(2, 32, 2, 256).swapaxes(1, 2).reshape(128, 256)
    assert np.array_equal(found["2.qkv"][256:384], rows)
    assert np.array_equal(found["2.qkv"][384:], theirs("blk.2.attn_v.weight"))
    if kind.startswith("Q"):
        want = load_file(Path(weights.__file__).parents[1] / "bundled" / "tiny" / "model.safetensors")
        assert not torch.equal(found["embed"], want["model.embed_tokens.weight"].float()), "nothing was rounded"


def test_k_quants_in_a_model(bundled: Path, tmp_path: Path) -> None:
    """Scales are rounded to float16, by at most 2^-11 of each; integers stay what they are."""
    path = tmp_path / "x.gguf"
    raw = mixed(bundled, path)
    found = loaded(load_spec(path), path)
    places = {
        "token_embd": found["embed"],
        "blk.1.ffn_up": found["1.gate_up"][768:],
        "blk.3.ffn_gate": found["3.gate_up"][:768],
    }
    original = {k: v.float().numpy() for k, v in load_file(bundled / "model.safetensors").items()}
    for stem, ours in places.items():
        kind, data = raw[f"{stem}.weight"]
        exact = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
        kept = quantized(torch.from_numpy(data), kind, exact.shape).dequantized()
        assert torch.equal(ours, kept)
        assert np.abs(ours.numpy() - exact).max() <= 3 * 2.0**-11 * np.abs(exact).max()
    embed = original["model.embed_tokens.weight"]
    assert np.abs(places["token_embd"].numpy() - embed).max() < 0.05 * np.abs(embed).max(), "the values are the model's"
    rows = gguf.quants.dequantize(raw["blk.0.attn_q.weight"][1], gguf.GGMLQuantizationType.Q4_K)
    rows = rows.reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256)
    assert np.abs(found["0.qkv"][:256].numpy() - rows).max() <= 3 * 2.0**-11 * np.abs(rows).max()


def answers(model: str | Path, **options: Any) -> list[list[int]]:
    prompts = ["The sea was", "It rained, and", "Once upon a time there was a king who"]
    with LLM(model, threads=1, memory="600M", max_model_len=256, **options) as llm:
        found = llm.generate(prompts, SamplingParams(max_tokens=40, temperature=0))
        chat = llm.chat(
            [[{"role": "user", "content": "Tell me about the sea."}]], SamplingParams(max_tokens=20, temperature=0)
        )
    return [output.prompt_token_ids + output.outputs[0].token_ids for output in [*found, *chat]]


def test_greedy_tokens_equal_the_safetensors_ones(bundled: Path, bundled_gguf: Callable[..., Path]) -> None:
    """Prompts and a conversation, through the file's own tokenizer and template."""
    assert answers(bundled_gguf("F32")) == answers(bundled)


def test_split_files(bundled: Path, bundled_gguf: Callable[..., Path], tmp_path: Path) -> None:
    whole = bundled_gguf("Q8_0")
    reader = gguf.GGUFReader(whole)
    names = [tmp_path / f"tiny-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for number, name in enumerate(names):
        writer = gguf.GGUFWriter(name, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for key, one in reader.fields.items() if number == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                writer.add_key_value(key, one.contents(), one.types[0], one.types[-1] if len(one.types) > 1 else None)
        for tensor in reader.tensors[number::3]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    spec = load_spec(names[0])
    assert same_weights(loaded(spec, names[0]), loaded(spec, whole))
    with pytest.raises(
        ConfigError, match=r"is a later part of a checkpoint; name the first, tiny-00001-of-00003\.gguf"
    ):
        load_spec(names[1])
    names[2].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(
        ConfigError, match=r"tiny-00003-of-00003\.gguf, the 3\. of 3 files of this checkpoint, does not exist"
    ):
        load_spec(names[0])
    names[0].rename(tmp_path / "tiny.gguf")
    with pytest.raises(ConfigError, match="their names must end in"):
        load_spec(tmp_path / "tiny.gguf")


def with_frequencies(values: list[float]) -> Forge:
    forge = model()
    forge.tensors.append(("rope_freqs.weight", (len(values),), 0, np.array(values, dtype=np.float32).tobytes()))
    return forge


def scaled(kind: str, **more: float) -> Forge:
    forge = model().set("llama.rope.scaling.type", STRING, kind)
    for key, number in more.items():
        forge.set(f"llama.rope.scaling.{key}", U32 if key.startswith("orig") else F32, number)
    return forge


MIXTRAL = model().set("llama.expert_count", U32, 8)
WRONG: dict[str, tuple[Forge, str]] = {
    "architecture": (model("gptbert"), r"'gptbert' \(general\.architecture\) is not read from GGUF; weft reads llama"),
    "no architecture": (model().drop("general.architecture"), "'None'"),
    "mixtral": (MIXTRAL, "Mixtral"),
    "no shape": (model().drop("llama.block_count"), r"lacks llama\.block_count"),
    "no embedding": (model().drop("token_embd.weight"), "has no tensor token_embd.weight"),
    "layers differ": (
        model().set("llama.attention.head_count_kv", ARRAY, (U32, [2, 1])),
        "head_count_kv differs from layer",
    ),
    "heads": (model().set("llama.attention.head_count", U32, 5), "32 values cannot be parted among 5 heads"),
    "half a head turns": (model().set("llama.rope.dimension_count", U32, 4), "rope.dimension_count is 4; heads have 8"),
    "text for a number": (model().set("llama.embedding_length", STRING, "32"), "cannot be parted"),
    "huge": (model().set("llama.block_count", U32, 1 << 31), r"x\.gguf: num_hidden_layers is 2147483648; expected"),
    "longrope": (scaled("longrope"), "'longrope'; weft reads none, linear and yarn"),
    "two scalings": (
        with_frequencies([1.0] * 4).set("llama.rope.scaling.type", STRING, "yarn"),
        "expected one of both",
    ),
    "too few frequencies": (with_frequencies([1.0] * 3), r"rope_freqs\.weight is F32 \[3\]; expected F32 with 4"),
    "frequency 0": (with_frequencies([1.0, 0.0, 1.0, 1.0]), "divisors must be 4 numbers above 0"),
    "ext factor": (scaled("yarn", factor=4.0, yarn_ext_factor=0.5), "yarn_ext_factor"),
    "linear 0": (scaled("linear", factor=-1.0), r"rope_scaling\.factor is -1\.0; expected a number above 0"),
    "split count": (model().set("split.count", U32, 1 << 20), "split.count is 1048576"),
}


@pytest.mark.parametrize("name", WRONG)
def test_configurations_that_are_refused(name: str, tmp_path: Path) -> None:
    forge, match = WRONG[name]
    path = forge.write(tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match=match) as caught:
        load_spec(path)
    assert "x.gguf" in str(caught.value)


def test_tensors_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    spec = load_spec(model().write(path))
    cases = [
        (
            model().drop("blk.0.ffn_up.weight"),
            r"lacks model\.layers\.0\.mlp\.up_proj\.weight, which its metadata ask for",
        ),
        (more("blk.0.attn_sinks.weight"), r"has blk\.0\.attn_sinks\.weight, of which its metadata say nothing"),
        (more("blk.00.ffn_up.weight"), "one tensor too many"),
        (
            changed("blk.0.ffn_up.weight", (32, 32), 2),
            r"the shape of model\.layers\.0\.mlp\.up_proj\.weight \[32, 32\]",
        ),
        (changed("blk.0.attn_q.weight", (32, 31), 8), "31 rows of blk.0.attn_q.weight cannot be parted among 4 heads"),
    ]
    for forge, match in cases:
        forge.write(path)
        with pytest.raises(ConfigError, match=match):
            loaded(spec, path)
    wide = model(width=256, inner=256)
    wide.tensors = [(n, d, 23 if n == "blk.0.ffn_up.weight" else k, b) for n, d, k, b in wide.tensors]
    with pytest.raises(
        ConfigError, match=r"up_proj\.weight \(IQ4_XS\) in a number format .* it reads F32, F16, BF16, Q8_0"
    ):
        loaded(load_spec(wide.write(path)), path)


def more(name: str) -> Forge:
    forge = model()
    forge.tensors.append((name, (32,), 0, None))
    return forge


def changed(name: str, dims: tuple[int, ...], kind: int) -> Forge:
    forge = model()
    forge.tensors = [(n, dims, kind, None) if n == name else (n, d, k, b) for n, d, k, b in forge.tensors]
    return forge


def test_what_the_metadata_say(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    config = load_config(model().write(path))
    assert (config["vocab_size"], config["head_dim"], config["tie_word_embeddings"]) == (12, 8, True)
    untied = model()
    untied.tensors.append(("output.weight", (32, 12), 0, None))
    assert load_config(untied.write(path))["tie_word_embeddings"] is False
    assert "head" in loaded(load_spec(path), path)
    rope = load_spec(with_frequencies([1.0, 2.0, 4.0, 8.0]).write(path)).layers[0].rope
    assert rope is not None
    assert (rope.kind, rope.divisors, rope.theta) == ("divided", (1.0, 2.0, 4.0, 8.0), 500.0)
    old = load_spec(model().set("llama.rope.scale_linear", F32, 4.0).write(path)).layers[0].rope
    assert old is not None
    assert (old.kind, old.factor) == ("linear", 4.0)
    yarn = scaled("yarn", factor=4.0, original_context_length=16, attn_factor=0.5)
    found = load_spec(yarn.write(path)).layers[0].rope
    assert found is not None
    assert (found.kind, found.original) == ("yarn", 16)
    assert math.isclose(found.attention_factor, 0.5 * (0.1 * math.log(4.0) + 1.0))
    window = load_spec(model().set("llama.attention.sliding_window", U32, 16).write(path))
    assert (window.family, window.layers[0].window) == ("mistral", 16)
    same = load_spec(model().set("llama.attention.head_count_kv", ARRAY, (U32, [2])).write(path))
    assert same.kv_heads == 2


def test_the_catalogue_says_what_quantized_weights_need(bundled_gguf: Callable[..., Path]) -> None:
    entry = catalogue(bundled_gguf("Q4_0"))["model.layers.1.self_attn.k_proj.weight"]
    assert (entry.type.name, entry.shape, entry.pairs) == ("Q4_0", (128, 256), 64)
    data = entry.file.read_bytes()[entry.start : entry.stop]
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    found = load_file(Path(weights.__file__).parents[1] / "bundled" / "tiny" / "model.safetensors")
    want = found["model.layers.1.self_attn.k_proj.weight"].float()
    exact = dequantized(raw, "Q4_0", (128, 256))
    rows = exact.view(2, 32, 2, 256).transpose(1, 2).reshape(128, 256)
    assert (rows - want).abs().max() < 0.25 * want.abs().max(), "rows stand where the checkpoint has them"
