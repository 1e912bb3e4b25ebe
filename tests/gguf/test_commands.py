"""A .gguf file wherever a folder may be given: the commands, the server, a model that guesses."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cli.running import Serving, weft
from tests.gguf.kquants import mixed
from weft import LLM, SamplingParams
from weft.cli.app import app
from weft.errors import ConfigError
from weft.hub import model_id, resolve
from weft.models.gguf import blocks

HOW = ("--threads", "1", "--memory", "600M", "--max-model-len", "256")


def call(*args: str) -> Any:
    return CliRunner().invoke(app, [*args], prog_name="weft")


def test_where_files_are(tmp_path: Path, bundled_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundled_gguf("Q8_0")
    assert resolve(path) == resolve(str(path)) == path
    assert model_id(path) == "tiny-Q8_0"
    first = tmp_path / "big-00001-of-00002.gguf"
    first.touch()
    assert model_id(first) == "big"
    with pytest.raises(ConfigError, match=r"has no config\.json; did you mean .*big-00001-of-00002\.gguf"):
        resolve(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/big-00001-of-00002.gguf") == first
    with pytest.raises(ConfigError, match=r"or a \.gguf file"):
        resolve(__file__)


def test_check_compares_with_an_independent_reader(bundled_gguf: Callable[..., Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The sea was calm that morning.\nWhy?\n")
    done = call("check", str(bundled_gguf("Q8_0")), "--prompts", str(prompts), "--json", "--new", "6", *HOW)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["pass"]
    assert told["greedy_equal"]
    assert told["model"] == "tiny-Q8_0"


def test_check_of_k_types(bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They pass although scales are kept in 16 bits; they do not where weft reads anything else."""
    path, prompts = tmp_path / "mixed.gguf", tmp_path / "prompts.txt"
    mixed(bundled, path)
    prompts.write_text("The sea was calm that morning.\nWhy?\n")
    how = ("check", str(path), "--prompts", str(prompts), "--json", "--new", "4", *HOW)
    done = call(*how)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["max_abs_logit_diff"] < 2e-4
    right = blocks._sixes
    monkeypatch.setattr(blocks, "_sixes", lambda raw: tuple(x * 1.01 for x in right(raw)))
    assert call(*how).exit_code == 1


def test_check_without_the_package(bundled_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundled_gguf("Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    done = call("check", str(path), *HOW)
    assert done.exit_code != 0
    assert "pip install gguf" in " ".join(done.output.split())


def test_plan_and_generate(bundled_gguf: Callable[..., Path]) -> None:
    path = str(bundled_gguf("Q8_0"))
    told = json.loads(call("plan", path, "--json", *HOW).stdout)
    assert told["model"] == "tiny-Q8_0", told
    done = weft("generate", path, "The sea was", "--max-tokens", "6", "--temperature", "0", *HOW)
    assert done.returncode == 0, done.stderr
    piped = weft("generate", path, "--max-tokens", "6", "--temperature", "0", *HOW, stdin="The sea was")
    assert piped.stdout == done.stdout
    assert len(done.stdout.split()) >= 3


def test_serve(bundled_gguf: Callable[..., Path], tmp_path: Path) -> None:
    with Serving(tmp_path, str(bundled_gguf("Q8_0")), "--port", "0", *HOW) as serving:
        body = {
            "model": "tiny-Q8_0",
            "max_tokens": 8,
            "temperature": 0,
            "messages": [{"role": "user", "content": "Hello."}],
        }
        request = urllib.request.Request(
            f"{serving.url()}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            told = json.load(answer)
        assert told["model"] == "tiny-Q8_0"
        assert told["choices"][0]["message"]["content"].strip()


def test_a_draft_may_be_a_file(bundled: Path, bundled_gguf: Callable[..., Path]) -> None:
    params = SamplingParams(max_tokens=24, temperature=0)
    how: dict[str, Any] = {"threads": 1, "memory": "600M", "max_model_len": 256}
    with LLM(bundled, **how) as llm:
        want = llm.generate(["The sea was"], params)[0].outputs[0].token_ids
    part = f"draft=speculative_sampling(model={str(bundled_gguf('F32'))!r})"
    with LLM(bundled, techniques=[part], **how) as llm:
        assert llm.generate(["The sea was"], params)[0].outputs[0].token_ids == want


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("Q8_0", "int4"),
        ("Q8_0", "int8"),
        ("Q4_0", "int8"),
        ("Q4_1", "int4:128"),
        ("Q5_1", "int8:16:zero"),
        ("Q4_0", "int4"),
    ],
)
def test_weights_of_few_bits_are_rounded_again(kind: str, weights: str, bundled_gguf: Callable[..., Path]) -> None:
    """To what is asked for, whether it holds the file's numbers or not; on the kernels as the reference operations do it."""
    found = []
    for ops in ("cpu", "ref"):
        with LLM(bundled_gguf(kind), weights=weights, ops=ops, threads=1, memory="600M", max_model_len=128) as llm:
            found.append(
                llm.generate(["The sea was"], SamplingParams(max_tokens=16, temperature=0))[0].outputs[0].token_ids
            )
    assert found[0] == found[1]


def test_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not a model" * 10)
    for command in (["plan"], ["generate", "-p", "x"], ["check"]):
        done = call(command[0], str(path), *command[1:])
        assert done.exit_code != 0
        assert "does not begin with 'GGUF'" in " ".join(done.output.split())
