"""The shipped draft from the command line: plan, generate, bench and serve, and a request of the server that declines it."""

from __future__ import annotations

import json
import re
import signal
import urllib.request
from pathlib import Path
from typing import Any

from tests.cli.running import Serving, weft
from weft.exec.build import EngineConfig, prepare
from weft.hub import resolve

WITH = ("--with", "draft=speculative_sampling(guesses=3)")
SMALL = ("--threads", "1", "--memory", "700M", "--max-model-len", "256")


def test_plan_shows_the_second_model() -> None:
    found = json.loads(weft("plan", "--json", "--device", "cpu", *WITH, *SMALL).stdout)
    assert found["draft_bytes"] > 2_672_384 * 4
    assert WITH[1] in found["stack"]
    assert "draft model" in weft("plan", "--device", "cpu", *WITH, *SMALL).stdout
    plain = json.loads(weft("plan", "--json", "--device", "cpu", *SMALL).stdout)
    assert plain["draft_bytes"] == 0
    assert "draft model" not in weft("plan", "--device", "cpu", *SMALL).stdout


def test_the_shipped_draft_is_of_the_bundled_model_s_vocabulary() -> None:
    setup = prepare(EngineConfig(model=resolve(None), techniques=[WITH[1]]))
    assert setup.draft is not None
    assert setup.draft.vocab == setup.spec.vocab


def test_generate_says_the_same_with_it() -> None:
    def say(*more: str) -> str:
        flags = ("--seed", "5", "--temperature", "0.8", "--max-tokens", "24")
        done = weft("generate", "-p", "The sea was", *flags, *SMALL, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert say(*WITH) == say()


def test_bench_decode_takes_several_tokens_a_step() -> None:
    done = weft(
        "bench",
        "decode",
        "--model",
        "bundled",
        "--prompt",
        "16",
        "--new",
        "25",
        "--batch",
        "1",
        "--repeat",
        "1",
        "--json",
        "--threads",
        "1",
        "--draft-control",
        "off",
        *WITH,
    )
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)
    assert WITH[1] in record["stack"]
    assert 1 <= record["steps"] < 24, "as many steps as tokens after the first: no guess was taken"


def ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.loads(response.read())
    return answer


def proposed(url: str) -> int:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        text = response.read().decode()
    found = re.findall(r'^weft:technique_acts_total\{[^}]*act="proposed"[^}]*\} (\d+)', text, re.MULTILINE)
    return sum(map(int, found))


def test_serve_with_it_and_a_request_that_declines(tmp_path: Path) -> None:
    body = {"model": "weft-tiny", "prompt": "Once upon a time there was", "max_tokens": 24, "seed": 3}
    with Serving(tmp_path, "--port", "0", *SMALL, *WITH) as server:
        url = server.url()
        guessed = ask(url, body)["choices"][0]["text"]
        count = proposed(url)
        assert count > 0
        assert ask(url, {**body, "weft": {"with": ["draft=none"]}})["choices"][0]["text"] == guessed
        assert proposed(url) == count
        assert server.end(signal.SIGTERM) == 0
