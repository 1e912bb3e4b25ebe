"""`ModelText`: end tokens from every file, default sampling, prompts that cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from weft.errors import ConfigError, RequestError
from weft.front.text import ModelText
from weft.sampling import SamplingParams


def checkpoint(path: Path, bundled: Path, **files: dict[str, Any] | None) -> Path:
    """A copy of the bundled model's text files with other contents; None leaves a file out."""
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
    ):
        content = files.get(name.partition(".")[0], ...)
        if content is ...:
            shutil.copy(bundled / name, path / name)
        elif content is not None:
            (path / name).write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def toy(bundled: Path) -> ModelText:
    return ModelText.load(bundled, max_model_len=64, name="toy")


def test_the_bundled_model(toy: ModelText) -> None:
    assert toy.eos_ids == (4, 0)
    assert toy.vocab_size == 4096
    assert toy.bos_id == 0
    assert toy.has_chat_template
    assert toy.defaults == {"temperature": 0.7, "top_p": 0.95}
    assert toy.prompt_ids("hi") == toy.tokenizer.encode("hi")
    assert toy.chat_ids([{"role": "user", "content": "hi"}]) == [2, *toy.tokenizer.encode("hi"), 4, 3]


@pytest.mark.parametrize(
    ("generation", "config", "want"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 6}, (5, 6, 4)),
        ({"eos_token_id": [7, 5]}, {"eos_token_id": [5, 8]}, (7, 5, 8, 4)),
        (None, {}, (4,)),
        ({"eos_token_id": None}, {"text_config": {"eos_token_id": 9, "vocab_size": 4096}}, (9, 4)),
        ({"eos_token_id": [-1, 4096, 100_000]}, {"vocab_size": 4096}, (4,)),
    ],
)
def test_every_end_token_counts(
    tmp_path: Path, bundled: Path, generation: dict[str, Any] | None, config: dict[str, Any], want: tuple[int, ...]
) -> None:
    text = ModelText.load(checkpoint(tmp_path, bundled, generation_config=generation, config=config))
    assert text.eos_ids == want
    params = SamplingParams(stop_token_ids=[11])
    assert params.spec(eos=text.eos_ids, vocab=text.vocab_size, room=9).stop_ids == (11, *want)


@pytest.mark.parametrize(
    ("generation", "want"),
    [
        (None, {}),
        ({}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 9}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": None}, {"temperature": 0.6, "top_k": 20}),
        (
            {"temperature": 1, "min_p": 0.1, "repetition_penalty": 1.1},
            {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.1},
        ),
        ({"max_new_tokens": 5, "penalty_alpha": 3, "typical_p": 1.0}, {}),
    ],
)
def test_default_sampling(
    tmp_path: Path, bundled: Path, generation: dict[str, Any] | None, want: dict[str, Any]
) -> None:
    text = ModelText.load(checkpoint(tmp_path, bundled, generation_config=generation))
    assert dict(text.defaults) == want
    params = text.default_params()
    assert params.temperature == want.get("temperature", 1.0)
    assert params.top_p == want.get("top_p", 1.0)


def test_what_the_request_says_goes_before_the_models_defaults(toy: ModelText) -> None:
    params = toy.default_params(temperature=0.1, top_p=None, n=2, max_tokens=None)
    assert (params.temperature, params.top_p, params.n, params.max_tokens) == (0.1, 0.95, 2, None)
    assert toy.default_params().max_tokens == 16
    with pytest.raises(RequestError, match="temperature") as caught:
        toy.default_params(temperature=float("nan"))
    assert caught.value.param == "temperature"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("generation_config", {"temperature": "hot"}, "temperature must be a number"),
        ("generation_config", {"temperature": float("inf")}, "temperature must be a number"),
        ("generation_config", {"top_p": 7}, "top_p"),
        ("generation_config", {"top_k": True}, "top_k"),
        ("generation_config", {"eos_token_id": "4"}, "eos_token_id"),
        ("generation_config", {"eos_token_id": [4, None]}, "eos_token_id"),
        ("config", {"eos_token_id": 4.5}, "eos_token_id"),
        ("config", {"vocab_size": 0}, "vocab_size"),
        ("config", {"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_bad_settings(tmp_path: Path, bundled: Path, name: str, content: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ModelText.load(checkpoint(tmp_path, bundled, **{name: content}))


@pytest.mark.parametrize(
    ("prompt", "match", "code"),
    [
        ("", "empty", "empty_prompt"),
        ([], "empty", "empty_prompt"),
        ([0, -1], "id -1 is outside the vocabulary", None),
        ([4096, 0], "id 4096 is outside the vocabulary", None),
        ([1.0], "whole numbers", None),
        ([True], "whole numbers", None),
        (["a"], "whole numbers", None),
        ([1] * 64, "64 tokens.*64 tokens", "context_length_exceeded"),
        ("word " * 100, "tokens.*shorten", "context_length_exceeded"),
        ("x" * 1_000_000, "1000000 characters", "context_length_exceeded"),
        ("\ud800", "surrogate", None),
    ],
)
def test_prompts_that_cannot_be(toy: ModelText, prompt: Any, match: str, code: str | None) -> None:
    with pytest.raises(RequestError, match=match) as caught:
        toy.prompt_ids(prompt)
    assert caught.value.code == code


def test_prompts_that_can(toy: ModelText) -> None:
    assert toy.prompt_ids([1] * 63) == [1] * 63
    assert toy.prompt_ids([4095, 0]) == [4095, 0]


def test_chats_that_cannot_be(toy: ModelText, tmp_path: Path, bundled: Path) -> None:
    with pytest.raises(RequestError, match="shorten") as caught:
        toy.chat_ids([{"role": "user", "content": "word " * 100}])
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")
    with pytest.raises(RequestError, match="at least one message"):
        toy.chat_ids([])
    checkpoint(tmp_path, bundled)
    (tmp_path / "chat_template.jinja").unlink()
    bare = ModelText.load(tmp_path, name="bare")
    assert not bare.has_chat_template
    with pytest.raises(RequestError, match="bare has no chat template; use /v1/completions"):
        bare.chat_ids([{"role": "user", "content": "x"}])


def test_bos_of_a_template_is_the_only_one(tmp_path: Path, bundled: Path) -> None:
    settings = json.loads((bundled / "tokenizer_config.json").read_text()) | {"add_bos_token": True}
    checkpoint(tmp_path, bundled, tokenizer_config=settings)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    text = ModelText.load(tmp_path)
    hi = text.tokenizer.encode("hi", add_special=False)
    assert text.chat_ids([{"role": "user", "content": "hi"}]) == [0, *hi]
    assert text.prompt_ids("hi") == [0, *hi]
    assert text.prompt_ids("<|endoftext|>hi") == [0, *hi]
    assert text.prompt_ids("hi", add_special=False) == hi


def test_sequences_follow_the_parameters(toy: ModelText) -> None:
    ids = [*toy.tokenizer.encode("one stop two"), 4]
    stopped = toy.sequence(SamplingParams(stop=["stop"]))
    assert stopped.push(ids) == ("one ", "stop")
    ended = toy.sequence(SamplingParams(skip_special_tokens=False))
    ended.push(ids, finished=True)
    assert ended.text == "one stop two"
    ignoring = toy.sequence(SamplingParams(skip_special_tokens=False, ignore_eos=True))
    ignoring.push(ids, finished=True)
    assert ignoring.text == "one stop two<|end|>"


def test_no_torch_is_imported() -> None:
    import subprocess
    import sys

    program = (
        "import sys; from weft.front.text import ModelText; import weft.hub; "
        "t = ModelText.load(weft.hub.resolve(None)); t.chat_ids([{'role': 'user', 'content': 'x'}]); "
        "print([m for m in ('torch', 'transformers', 'jinja2', 'huggingface_hub', 'numpy') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
