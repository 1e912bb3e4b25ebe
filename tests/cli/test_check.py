"""`weft check`: it passes on a checkpoint that both run alike, and fails when ours is wrong in one field."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from weft.cli._compare import Comparison, waves
from weft.cli.app import app
from weft.cli.check import prompt_ids, read_prompts
from weft.errors import ConfigError
from weft.exec import build
from weft.front.text import ModelText

KEYS = {"prompts", "positions", "max_abs_logit_diff", "greedy_equal", "pass"}
HOW = ("--json", "--new", "6", "--threads", "1", "--memory", "600M", "--max-model-len", "128")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3 with a sharp attention, saved by transformers, under the bundled model's tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=4096, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else parameter.mul_(torch.rand_like(parameter) + 0.5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(build.__file__).parents[1] / "bundled" / "tiny" / name, folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("The sea was calm that morning, and nobody spoke.\n\nOne two three four five\nWhy?\n")
    return file


def call(*args: str) -> Result:
    return CliRunner().invoke(app, ["check", *args], prog_name="weft")


def test_it_passes_and_prints_every_contracted_key(checkpoint: Path, prompts: Path) -> None:
    done = call(str(checkpoint), "--prompts", str(prompts), *HOW)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    text = ModelText.load(checkpoint)
    lengths = [len(text.prompt_ids(p)) for p in prompts.read_text().splitlines() if p]
    assert told.keys() >= KEYS
    assert told["pass"] is told["greedy_equal"] is True
    assert told["prompts"] == 3
    assert told["positions"] == sum(lengths) + 3 * 5, "every position but the last token's, which nothing follows"
    assert 0 < told["max_abs_logit_diff"] <= told["tolerance"]
    assert told["tolerance"] >= 1e-4


def test_in_16_bits_it_is_judged_by_other_bounds(checkpoint: Path, prompts: Path) -> None:
    result = call(str(checkpoint), "--prompts", str(prompts), "--dtype", "bfloat16", *HOW)
    told = json.loads(result.stdout)
    assert result.exit_code == 0, result.output
    assert told["max_abs_logit_diff"] > 1e-4, "bfloat16 is not float32"
    assert told["top1_agreement"] >= 0.9


@pytest.mark.parametrize("field", ["norm_eps", "qk_norm", "theta"])
def test_a_wrong_field_of_ours_fails(
    checkpoint: Path, prompts: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = build.read

    def wrong(raw):
        spec = right(raw)
        if field == "norm_eps":
            return replace(spec, norm_eps=1e-2)
        layers = []
        for layer in spec.layers:
            rope = replace(layer.rope, theta=5000.0) if field == "theta" else layer.rope
            layers.append(
                replace(layer, rope=rope, query_scale=layer.query_scale * (1.02 if field == "qk_norm" else 1.0))
            )
        return replace(spec, layers=tuple(layers))

    monkeypatch.setattr(build, "read", wrong)
    result = call(str(checkpoint), "--prompts", str(prompts), *HOW)
    told = json.loads(result.stdout)
    assert result.exit_code == 1
    assert told["pass"] is False
    assert told["max_abs_logit_diff"] > told["tolerance"]


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    result = call("bundled")
    assert result.exit_code == 2
    assert "pip install 'weft[hf]'" in result.stderr


# ---------------------------------------------------------------------------------------------- the judge


def judged(*, exact: bool = True, token: int = 2, **changes: torch.Tensor) -> Comparison:
    """One prompt of 2 tokens and one of continuation, over 4 tokens of vocabulary; the reference's best is 2."""
    theirs = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 5.0, 4.9999]])
    found = Comparison(exact=exact)
    found.take(0, 2, [7, 7, token], changes.get("ours", theirs.clone()), theirs)
    return found


def test_equal_logits_pass() -> None:
    found = judged()
    assert found.passed
    assert (found.prompts, found.positions, found.max_abs_logit_diff, found.agreed) == (1, 2, 0.0, 2)


def test_a_difference_in_one_logit_fails() -> None:
    ours = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 5.0, 4.9999]])
    ours[0, 0] += 2e-4
    found = judged(ours=ours)
    assert found.greedy_equal
    assert not found.passed
    assert found.max_abs_logit_diff == pytest.approx(2e-4, rel=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_fails(value: float) -> None:
    assert not judged(ours=torch.full((2, 4), value)).passed


def test_another_token_fails_unless_it_is_a_tie() -> None:
    tie = judged(token=3)
    assert (tie.greedy_equal, tie.ties) == (True, 1)
    wrong = judged(token=1)
    assert not wrong.passed
    assert wrong.wrong == [{"prompt": 0, "token": 0, "ours": 1, "reference": 2, "gap": 4.0}]


def test_nothing_compared_is_no_pass() -> None:
    assert not Comparison(exact=True).passed


def test_the_tolerance_grows_with_the_logits_only_above_ten() -> None:
    assert Comparison(exact=True, peak=4.0).tolerance == pytest.approx(1e-4)
    assert Comparison(exact=True, peak=30.0).tolerance == pytest.approx(3e-4)


def test_waves_keep_logits_within_bounds() -> None:
    assert list(waves([3, 3, 3, 10, 1], 10, 60)) == [[0, 1], [2], [3], [4]]
    assert list(waves([], 10, 60)) == []


# ---------------------------------------------------------------------------------------------- prompts


def test_prompts_come_from_lines_or_json(tmp_path: Path) -> None:
    lines, listed = tmp_path / "a.txt", tmp_path / "a.json"
    lines.write_text("one\n\n two\n")
    listed.write_text('["one", "a\\nb"]')
    assert read_prompts(lines) == ["one", " two"]
    assert read_prompts(listed) == ["one", "a\nb"]
    for bad in ("{}", "[]", "[1]", "[", '[""]'):
        listed.write_text(bad)
        with pytest.raises(ConfigError, match=r"a\.json"):
            read_prompts(listed)


def test_own_prompts_are_those_that_fit_and_one_long_one(bundled: Path) -> None:
    text = ModelText.load(bundled)
    everything = prompt_ids(text, None, 4000, 32)
    assert len(everything) == 14
    assert len(everything[-1]) == 512
    few = prompt_ids(text, None, 24, 4)
    assert 1 < len(few) < 14
    assert max(map(len, few)) <= 24
    with pytest.raises(ConfigError, match="--prompts"):
        prompt_ids(ModelText.load(bundled, max_model_len=8), ["word " * 30], 7, 1)
