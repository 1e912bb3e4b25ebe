"""A grown model computes its source's function, at the full cost of its shape, and stores no more zeros than it must."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.exec.conftest import STORY
from tests.models.checkpoints import make
from tests.models.harness import bench_for
from tools.grow import SHAPES, WEIGHTS, Growth, Shape, Source, chosen, grow, halves, main, zeros
from weft import LLM, SamplingParams
from weft.errors import ConfigError
from weft.front.tokenizer import Tokenizer
from weft.models import load_config, load_spec
from weft.models.decoder import Seam
from weft.models.layout import parameters

OLD = Shape(layers=8, width=256, heads=4, kv_heads=2, intermediate=768)
GROWN = {
    "deeper": Shape(layers=11, width=256, heads=4, kv_heads=2, intermediate=768),
    "wider": Shape(layers=8, width=320, heads=4, kv_heads=2, intermediate=768),
    "groups of 7": Shape(layers=9, width=448, heads=14, kv_heads=2, intermediate=1000),
    "8 kv heads of 4": Shape(layers=10, width=512, heads=32, kv_heads=8, intermediate=800),
    "3 kv heads": Shape(layers=8, width=288, heads=9, kv_heads=3, intermediate=769),
    "a kv head for each": Shape(layers=8, width=256, heads=4, kv_heads=4, intermediate=768),
}
TOLERANCE = 1e-4
MOST_ZEROS = {"smollm2-135m": 0.21, "qwen2.5-0.5b": 0.15, "llama-3.2-1b": 0.12}
"""The share of zeros that bench/README.md states for each shape."""


def weft_logits(folder: Path, tokens: list[int], dtype: str = "float32") -> Tensor:
    """Logits of every position, computed in uneven chunks over a paged cache."""
    return bench_for(load_spec(folder), folder, dtype=dtype).chunked("a", tokens, 70).float()


@torch.no_grad()
def reference_logits(folder: Path, tokens: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


@pytest.fixture(scope="module")
def prompts(bundled: Path) -> list[list[int]]:
    """A story, a turn of chat, and program text."""
    tokenizer = Tokenizer.load(bundled)
    chat = "<|user|>What did the boy with the lantern say?<|end|><|assistant|>"
    code = Path(__file__).read_text(encoding="utf8")[:600]
    return [tokenizer.encode(text, add_special=False) for text in (STORY, STORY[:300] + chat, code)]


@pytest.fixture(scope="module")
def wanted(bundled: Path, prompts: list[list[int]]) -> list[Tensor]:
    """What transformers computes with the source."""
    return [reference_logits(bundled, tokens) for tokens in prompts]


@pytest.mark.parametrize("name", GROWN)
def test_the_function_is_the_same(
    name: str, bundled: Path, tmp_path: Path, prompts: list[list[int]], wanted: list[Tensor]
) -> None:
    grow(bundled, tmp_path, GROWN[name], dtype="float32")
    assert Source(tmp_path).shape == GROWN[name]
    for tokens, logits in zip(prompts, wanted, strict=True):
        assert logits.abs().max() > 5, "the prompts say nothing"
        assert (weft_logits(tmp_path, tokens) - logits).abs().max() < TOLERANCE
        assert (reference_logits(tmp_path, tokens) - logits).abs().max() < TOLERANCE


def test_bfloat16_is_as_near_as_the_source_in_bfloat16(
    bundled: Path, tmp_path: Path, prompts: list[list[int]], wanted: list[Tensor]
) -> None:
    """Stored in bf16, only the norms' weights are rounded; what that costs is no more than computing in bf16 does."""
    grow(bundled, tmp_path, GROWN["groups of 7"], dtype="bfloat16")
    for tokens, logits in zip(prompts, wanted, strict=True):

        def distance(found: Tensor, logits: Tensor = logits) -> float:
            return float((found - logits).square().mean().sqrt() / logits.square().mean().sqrt())

        narrow = distance(reference_logits(bundled, tokens, torch.bfloat16))
        assert distance(weft_logits(tmp_path, tokens)) < min(narrow, 0.01)
        assert distance(weft_logits(tmp_path, tokens, "bfloat16")) < 1.5 * narrow
        assert distance(reference_logits(tmp_path, tokens, torch.bfloat16)) < 1.5 * narrow


def test_a_width_of_four_times_the_old_one_loses_nothing_in_bfloat16(bundled: Path, tmp_path: Path) -> None:
    """The norms are halved then, and every other old weight is kept or halved: no number is rounded."""
    shape = Shape(layers=9, width=1024, heads=8, kv_heads=2, intermediate=768)
    grow(bundled, tmp_path / "narrow", shape, dtype="bfloat16")
    tokens = Tokenizer.load(bundled).encode(STORY[:200], add_special=False)
    assert (weft_logits(tmp_path / "narrow", tokens) - weft_logits(bundled, tokens)).abs().max() < TOLERANCE


def test_an_untied_head_scaled_rope_and_other_head_sizes(tmp_path: Path) -> None:
    reference = make("llama3", tmp_path / "source")
    shape = Shape(layers=5, width=60, heads=12, kv_heads=4, intermediate=99)
    grow(reference.folder, tmp_path / "grown", shape, dtype="float32", seed=3)
    tokens = torch.randint(0, 211, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    logits = reference.logits(tokens)
    assert (weft_logits(tmp_path / "grown", tokens) - logits).abs().max() < TOLERANCE
    assert (reference_logits(tmp_path / "grown", tokens) - logits).abs().max() < TOLERANCE


def test_the_text_is_the_same(bundled: Path, tmp_path: Path) -> None:
    """Tokenizer, chat template and defaults of sampling are there, and a seed draws the same answer."""
    grow(bundled, tmp_path, GROWN["3 kv heads"], dtype="float32")
    law = SamplingParams(max_tokens=40, temperature=0.8, seed=5)
    answers = []
    for folder in (bundled, tmp_path):
        with LLM(folder, device="cpu", threads=1) as llm:
            answers.append([llm.chat([{"role": "user", "content": "Tell me about the sea."}], law)[0].outputs[0].text])
            answers[-1].append(llm.generate(["The sea was"])[0].outputs[0].text)
            assert llm.text.default_params(max_tokens=1).temperature == 0.7
    assert answers[0][0] == answers[1][0]
    assert len(answers[1][1]) > 0


# ---------------------------------------------------------------------------------------------- nothing is idle


@pytest.mark.parametrize("name", GROWN)
def test_zeros_are_where_they_must_be_and_nowhere_else(name: str, bundled: Path, tmp_path: Path) -> None:
    shape = GROWN[name]
    values, none = grow(bundled, tmp_path, shape, dtype="float32")
    stored = load_file(tmp_path / WEIGHTS)
    source = load_file(bundled / WEIGHTS)
    assert sum(t.numel() for t in stored.values()) == values == parameters(load_spec(tmp_path))
    assert all(torch.isfinite(t).all() for t in stored.values())
    assert sum(int((t == 0).sum()) for t in stored.values()) == none
    assert not any((t == 0).any() for t in source.values()), "the bundled model has no zeros of its own"
    assert none == zeros(OLD, shape, 64, 4096)
    for key, tensor in stored.items():
        if not key.endswith(("embed_tokens.weight", "o_proj.weight", "up_proj.weight", "down_proj.weight")):
            assert (tensor != 0).all(), key
    # Each MLP unit is read and written, each head is read, and no value of a head is always zero.
    for at in range(shape.layers):
        up, down = (stored[f"model.layers.{at}.mlp.{n}_proj.weight"] for n in ("up", "down"))
        assert (down != 0).any(0).all()
        if shape.width > OLD.width:
            assert (up != 0).any(1).all()


def test_heads_see_and_say_what_those_of_the_source_do(bundled: Path, tmp_path: Path) -> None:
    """In an added layer too, which stands before its model: queries, keys and values are equal and nowhere zero."""
    shape = GROWN["8 kv heads of 4"]
    grow(bundled, tmp_path, shape, dtype="float32")
    assert Growth(Source(bundled), shape).place.get(3) is None

    def heads(folder: Path, layers: list[int]) -> list[tuple[Tensor, ...]]:
        bench = bench_for(load_spec(folder), folder)
        found: list[tuple[Tensor, ...]] = []
        for layer in layers:
            bench.decoder.hook(Seam.QKV, layer, lambda batch, tensors: found.append(tuple(t.clone() for t in tensors)))
        bench.chunked("a", list(range(40, 80)), 40)
        return found

    (old,) = heads(bundled, [3])
    for new in heads(tmp_path, [3, 4]):
        for mine, theirs in zip(new, old, strict=True):
            copied = [h // 4 for h in range(8)] if mine.shape[1] == 8 else [h // 16 * 2 + h % 2 for h in range(32)]
            assert mine.abs().amax(0).min() > 0
            assert (mine - theirs[:, copied]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", SHAPES)
def test_the_share_of_zeros_of_the_named_shapes(name: str) -> None:
    shape = SHAPES[name]
    matrices = 2 * shape.width * 64 * (shape.heads + shape.kv_heads) + 3 * shape.width * shape.intermediate
    values = 4096 * shape.width + shape.layers * (matrices + 2 * shape.width) + shape.width
    share = zeros(OLD, shape, 64, 4096) / values
    assert MOST_ZEROS[name] - 0.01 < share < MOST_ZEROS[name]
    text = Path(__file__).parents[2].joinpath("bench", "README.md").read_text(encoding="utf8")
    assert f"{100 * share:.1f} %" in text


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "llama-3.2-1b"])
def test_the_named_shapes_are_the_bodies_of_published_models(name: str) -> None:
    theirs = load_spec(Path(__file__).parents[2] / "bench" / "shapes" / f"{name}.json")
    assert theirs.head_dim == 64
    assert SHAPES[name] == Shape(
        layers=len(theirs.layers), width=theirs.width, heads=theirs.heads, kv_heads=theirs.kv_heads,
        intermediate=theirs.layers[0].intermediate,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- how it is put together


def test_layers_stand_evenly_and_the_last_is_an_old_one(bundled: Path) -> None:
    def places(layers: int) -> list[int]:
        return sorted(
            Growth(Source(bundled), Shape(layers=layers, width=256, heads=4, kv_heads=2, intermediate=768)).place
        )

    assert places(8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert places(16) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert places(24) == [2, 5, 8, 11, 14, 17, 20, 23]
    assert places(11) == [0, 1, 3, 4, 5, 7, 8, 10]


def test_query_heads_stay_with_their_keys(bundled: Path) -> None:
    growth = Growth(Source(bundled), GROWN["groups of 7"])
    assert growth.kv_of.tolist() == [0, 1]
    assert growth.q_of.tolist() == [0, 1, 0, 1, 0, 1, 0, 2, 3, 2, 3, 2, 3, 2]
    growth = Growth(Source(bundled), GROWN["3 kv heads"])
    assert growth.kv_of.tolist() == [0, 0, 1]
    assert growth.q_of.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 2]
    for head in range(4):
        assert growth.share[growth.q_of == head].sum() == 1


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 100])
def test_shares_are_powers_of_two_that_add_up_to_one(count: int) -> None:
    parts = halves(count)
    assert len(parts) == count
    assert sum(parts) == 1
    assert all(math.frexp(p)[0] == 0.5 for p in parts)
    assert max(parts) <= 2 * min(parts)


def test_the_seed_decides_what_is_random(bundled: Path) -> None:
    def first(seed: int) -> Tensor:
        growth = Growth(Source(bundled), GROWN["wider"], seed)
        return next(make() for name, _, make in growth.tensors() if name.endswith("0.self_attn.q_proj.weight"))

    assert torch.equal(first(1), first(1))
    assert torch.equal(first(1)[:, :256], first(2)[:, :256])
    assert not (first(1)[:, 256:] == first(2)[:, 256:]).any()


def test_no_more_than_one_tensor_at_a_time(bundled: Path, tmp_path: Path) -> None:
    """What the command holds at its peak does not grow with the number of layers."""
    peaks = []
    for layers in (8, 24):
        shape = ("--layers", str(layers), "--width", "512", "--heads", "8", "--intermediate", "2048")
        code = (
            "import resource, sys; from tools.grow import main; "
            "assert main(sys.argv[1:]) == 0; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "bundled", str(tmp_path / str(layers)), *shape, "--dtype", "float32"],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        peaks.append(int(done.stdout.split()[-1]) * 1024)
    bytes_per_layer = 4 * (2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 2048)
    assert peaks[1] - peaks[0] < 4 * bytes_per_layer < 16 * bytes_per_layer


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"layers": 7}, "layers 7 is less than the source's 8"),
        ({"width": 128}, "width 128 is less"),
        ({"intermediate": 767}, "intermediate 767 is less"),
        ({"kv_heads": 1}, "kv_heads 1 is less"),
        ({"heads": 5}, "5 query heads cannot share 2"),
        ({"kv_heads": 3, "heads": 3}, "heads 3 is less"),
        ({"width": 0}, "width must be at least 1"),
        ({"width": 322}, "width 322 is not a multiple of heads 4"),
    ],
)
def test_shapes_that_cannot_hold_the_source(bundled: Path, sizes: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Growth(Source(bundled), chosen(None, sizes, OLD))


def test_too_few_query_heads_for_a_key_head(bundled: Path) -> None:
    source = Source(bundled)
    source.shape = replace(OLD, heads=8)
    Growth(source, replace(OLD, width=288, heads=12, kv_heads=3))
    with pytest.raises(ConfigError, match=r"9 heads over 3 key/value heads leave too few query heads .* serve 4"):
        Growth(source, replace(OLD, width=288, heads=9, kv_heads=3))


def test_other_families_and_biases_are_refused(tmp_path: Path) -> None:
    for name, said in (("qwen3", "of the family qwen3"), ("llama_bias_tied", "biases")):
        make(name, tmp_path / name)
        with pytest.raises(ConfigError, match=said):
            Source(tmp_path / name)


def test_the_command(bundled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["bundled", str(out), "--layers", "9", "--dtype", "float32"]) == 0
    said = capsys.readouterr()
    assert f"{out}: " in said.out
    assert "of them zero" in said.out
    assert load_config(out)["num_hidden_layers"] == 9
    assert {p.name for p in out.iterdir()} == {p.name for p in bundled.iterdir()} - {"README.md"}
    for arguments, text in (
        (["bundled", str(out)], "exists already"),
        (["bundled", str(tmp_path / "x"), "--dtype", "int4"], "--dtype is float32 or bfloat16"),
        (["bundled", str(tmp_path / "x"), "--seed", "-1"], "--seed must be"),
        (["bundled", str(tmp_path / "x"), "--shape", "qwen"], "there is no shape 'qwen'"),
        ([str(tmp_path / "none"), str(tmp_path / "x")], "none"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert text in said.err
        assert not (tmp_path / "x").exists()


def test_half_a_model_is_not_taken_for_one(bundled: Path, tmp_path: Path) -> None:
    def stop(name: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grow(bundled, tmp_path, OLD, tick=stop)
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path)


def test_growth_of_nothing_is_the_source(bundled: Path, tmp_path: Path) -> None:
    """The same shape gives every tensor back, to the bit."""
    grow(bundled, tmp_path, OLD)
    new, old = load_file(tmp_path / WEIGHTS), load_file(bundled / WEIGHTS)
    assert new.keys() == old.keys()
    assert all(torch.equal(new[name], old[name]) for name in old)
    mine, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, bundled))
    assert mine == theirs
