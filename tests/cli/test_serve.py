"""`weft serve` as a user starts it: the ready line, ports, signals, and errors that come before the model is loaded."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.cli.running import READY, Serving, weft
from weft.adapt.lora import LoRA
from weft.cli._server import ServerFlags
from weft.cli.serve import curl
from weft.errors import ConfigError
from weft.front.admission import Bounds

SMALL = ("--threads", "1", "--memory", "600M", "--max-model-len", "256")


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for the tests that only ask; it has two names and a key."""
    folder = tmp_path_factory.mktemp("serving")
    names = ("--served-model-name", "tiny", "--served-model-name", "it's small")
    with Serving(folder, "--port", "0", *SMALL, *names, WEFT_API_KEY="sesame") as server:
        server.url()
        yield server
        assert server.end(signal.SIGTERM) == 0
        assert "Traceback" not in server.err.read_text()


def test_a_recipe_and_shadow_checks_from_the_command_line(tmp_path: Path) -> None:
    """The recipe's stack serves, beside what --with lays over it, and every request is checked on the reference path."""
    recipe = tmp_path / "small.toml"
    recipe.write_text('[stack]\n"kv.store" = "int8"\ndraft = "ngram(guesses=2)"\n')
    flags = ("--recipe", str(recipe), "--with", "draft=ngram(guesses=3)", "--shadow", "1", "--shadow-alarm", "1e-9")
    with Serving(tmp_path, "--port", "0", *SMALL[:2], "--memory", "900M", "--max-model-len", "256", *flags) as server:
        url = server.url()
        body = {"prompt": "The sea was calm. The sea was", "max_tokens": 12, "seed": 1, "weft": {"label": True}}
        status, answer = ask(f"{url}/v1/completions", body)
        assert status == 200
        assert {"kv.store=int8", "draft=ngram(guesses=3)"} <= set(answer["weft"]["stack"])
        assert (answer["weft"]["fidelity"], answer["weft"]["redefines"]) == ("APPROX", [])
        until = time.monotonic() + 60
        while (told := metrics(url))["weft:shadow_requests_total"] < 1:
            assert time.monotonic() < until, told
            time.sleep(0.1)
        assert told["weft:shadow_tokens_total"] == 12
        assert 0 < told["weft:shadow_kl_mean"] < 1e-3, "int8 moves the laws a little"
        assert told["weft:shadow_alarm"] == 1
        assert server.end(signal.SIGTERM) == 0
    for wrong, said in (
        (("--shadow", "2"), "shadow"),
        (("--recipe", "/nowhere.toml"), "nowhere"),
        (("--shadow-alarm", "1"), "needs --shadow"),
    ):
        done = weft("serve", *SMALL, "--port", "0", *wrong)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def metrics(url: str) -> dict[str, float]:
    """Those without labels, by name."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name.partition("{")[0]: float(value) for name, value in pairs}


def test_adapters_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "root" / "one").mkdir(parents=True)
    LoRA.trial(tmp_path / "root" / "one")
    flags = ("--lora", f"poet={tmp_path / 'root' / 'one'}", "--lora-root", str(tmp_path / "root"), "--max-loras", "2")
    with Serving(tmp_path, "--port", "0", *SMALL, "--lora-memory", "32M", *flags) as server:
        url = server.url()
        assert "adapters" in server.err.read_text()
        status, _ = ask(f"{url}/v1/completions", {"model": "poet", "prompt": "The sea", "max_tokens": 3})
        assert status == 200
        plain = urllib.request.Request(
            f"{url}/v1/load_lora_adapter",
            json.dumps({"lora_name": "second", "lora_path": "one"}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(plain, timeout=60) as response:
            assert response.status == 200
        _, models = ask(f"{url}/v1/models")
        assert [m["id"] for m in models["data"]] == ["weft-tiny", "poet", "second"]
        assert server.end(signal.SIGTERM) == 0
    for wrong in (
        ("--lora", "poet"),
        ("--lora", "poet=/nowhere"),
        ("--lora-root", "/nowhere"),
        ("--lora-memory", "much"),
    ):
        done = weft("serve", *SMALL, "--port", "0", *wrong)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr


def ask(url: str, body: dict[str, object] | None = None, key: str | None = "sesame") -> tuple[int, dict]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_stdout_is_one_line_and_stderr_has_the_plan_and_a_curl_line(serving: Serving) -> None:
    serving.wait_for("try: ", serving.err)
    assert READY.fullmatch(serving.out.read_text())
    told = serving.err.read_text()
    assert "memory plan of weft-tiny" in told
    assert told.index("memory plan") < told.index("loading"), "the plan comes before anything is allocated"
    assert told.index("loading") < told.index("try: ")


def test_the_curl_line_works(serving: Serving) -> None:
    serving.wait_for("try: ", serving.err)
    line = serving.err.read_text().split("try:  ")[1].strip()
    assert "sesame" not in serving.err.read_text(), "the key must not show"
    done = subprocess.run(
        ["sh", "-c", line],
        env={"PATH": "/usr/bin:/bin:/usr/local/bin", "WEFT_API_KEY": "sesame"},
        capture_output=True,
        text=True,
    )
    if done.returncode == 127:
        pytest.skip("there is no curl on this machine")
    assert json.loads(done.stdout)["model"] == "tiny"


def test_names_and_key(serving: Serving) -> None:
    url = serving.url()
    body = {"prompt": "The sea", "max_tokens": 2}
    assert ask(f"{url}/v1/models", key=None)[0] == 401
    assert {m["id"] for m in ask(f"{url}/v1/models")[1]["data"]} == {"tiny", "it's small"}
    assert ask(f"{url}/v1/completions", {"model": "it's small", **body})[0] == 200
    assert ask(f"{url}/v1/completions", {"model": "weft-tiny", **body})[0] == 404


def test_a_conversation_with_the_server(serving: Serving) -> None:
    url, how = serving.url(), ("--temperature", "0", "--max-tokens", "6")
    said = weft("chat", "--url", url, *how, stdin="Tell me about the sea.\n", WEFT_API_KEY="sesame")
    body = {"temperature": 0, "max_tokens": 6, "messages": [{"role": "user", "content": "Tell me about the sea."}]}
    _, answer = ask(f"{url}/v1/chat/completions", {"model": "tiny", **body})
    assert said.returncode == 0, said.stderr
    assert said.stdout == answer["choices"][0]["message"]["content"] + "\n"
    refused = weft("chat", "--url", f"{url}/v1", *how, stdin="Hello\n", WEFT_API_KEY="wrong")
    assert refused.returncode == 2
    assert "401" in refused.stderr
    unknown = weft("chat", "gpt-9", "--url", url, stdin="Hello\n", WEFT_API_KEY="sesame")
    assert unknown.returncode == 1
    assert "gpt-9" in unknown.stderr


def test_a_taken_port_is_found_before_the_model_is_looked_at() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = weft("serve", "./no/such/folder", "--port", str(port))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: port {port} on 127.0.0.1 is taken; choose another one with --port\n"


def test_a_model_that_does_not_fit_is_refused_with_the_numbers() -> None:
    done = weft("serve", "--port", "0", "--memory", "40M")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error: the model does not fit: weights 28 MiB" in done.stderr
    assert "loading" not in done.stderr


FROZEN = """
import atexit, gc, pathlib, sys
atexit.register(lambda: pathlib.Path({told!r}).write_text(str(gc.get_freeze_count())) if "serve" in sys.argv else None)
"""


def test_ctrl_c_ends_a_running_server_with_status_0(tmp_path: Path) -> None:
    """SIGTERM is what ends the server of the fixture, with the same proof.

    By then Python no longer looks for cycles in what was there when it was ready, which holds all requests up for 40 to 70 ms.
    """
    (tmp_path / "sitecustomize.py").write_text(FROZEN.format(told=str(tmp_path / "frozen")))
    with Serving(tmp_path, "--port", "0", *SMALL, PYTHONPATH=str(tmp_path)) as server:
        url = server.url()
        told = ask(f"{url}/health", key=None)[1]
        assert told.keys() == {"status", "reason", "engine_pid", "engine_restarts", "last_step_s"}
        assert (told["status"], told["reason"], told["engine_restarts"]) == ("ok", None, 0)
        assert server.end(signal.SIGINT) == 0
        assert "Traceback" not in server.err.read_text()
    assert int((tmp_path / "frozen").read_text()) > 10_000


def test_a_signal_while_the_model_is_being_loaded_ends_it_with_status_0(tmp_path: Path) -> None:
    with Serving(tmp_path, "--port", "0", *SMALL) as server:
        server.wait_for("loading", server.err)
        assert server.end(signal.SIGTERM) == 0  # on a busy machine it may have been ready before the signal came
        assert READY.fullmatch(server.out.read_text() or "weft ready http://none:0\n")
        assert "Traceback" not in server.err.read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_body": "much"}, "not a size"),
        ({"max_queued_tokens": "-1"}, "not a size"),
        ({"rate_limit_tokens": "many"}, "not a size"),
        ({"rate_limit_requests": 0}, "--rate-limit-requests"),
    ],
)
def test_bounds_that_cannot_be(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ServerFlags(**given).check()


def test_bounds_are_those_of_the_flags() -> None:
    ServerFlags().check()
    assert ServerFlags().bounds == Bounds(max_queue=1024, max_queued_tokens=4 << 20)
    flags = ServerFlags(max_queue=7, max_queued_tokens="2K", rate_limit_requests=5, rate_limit_tokens="1M")
    assert flags.bounds == Bounds(max_queue=7, max_queued_tokens=2048, requests_per_minute=5, tokens_per_minute=1 << 20)


def test_the_curl_line_suits_the_model() -> None:
    assert "chat/completions" in curl("http://h:1", "m", chat=True)
    assert '"prompt": ' in curl("http://h:1", "m", chat=False)
    assert "WEFT_API_KEY" in curl("http://h:1", "m", chat=False, key=True)
    assert "'\"'\"'" in curl("http://h:1", "it's", chat=True), "a name with a quote is still one shell word"


def test_with_a_log_of_json_stderr_has_nothing_else(tmp_path: Path) -> None:
    """The plan, progress, requests, and the one sentence of a command that can't run."""
    with Serving(
        tmp_path, "--port", "0", "--threads", "1", "--log-format", "json", "--max-model-len", "256"
    ) as serving:
        assert httpx.post(f"{serving.url()}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        taken = weft(
            "serve", "--port", serving.url().rpartition(":")[2], "--log-format", "json", WEFT_HOME=str(tmp_path)
        )
        assert serving.end(signal.SIGTERM) == 0
        records = [json.loads(line) for line in serving.err.read_text().splitlines()]
    told = [record["message"] for record in records if "message" in record]
    for beginning in ("memory plan of weft-tiny: {", "loading ", "loaded ", "try:  curl "):
        assert [one for one in told if one.startswith(beginning)], beginning
    assert [record for record in records if record.get("route") == "/v1/completions"]
    assert taken.returncode == 2
    assert "is taken" in json.loads(taken.stderr)["message"]
    assert json.loads(taken.stderr)["level"] == "error"
