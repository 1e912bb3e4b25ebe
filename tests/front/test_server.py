"""Binding, readiness and the end of a server."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from tests.front.scripted import ScriptedPort
from weft.errors import ConfigError
from weft.front.app import create_app
from weft.front.gate import Gate
from weft.front.port import EngineState
from weft.front.server import Server, bind, serve
from weft.front.text import ModelText

Make = Callable[..., ScriptedPort]


def test_a_taken_port_is_one_sentence() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"^port {port} on 127\.0\.0\.1 is taken; choose another one with --port$"
        ):
            bind("127.0.0.1", port)
        with pytest.raises(ConfigError, match="is taken"):
            serve(Starlette(), "127.0.0.1", port)
    with bind("127.0.0.1", port) as again:  # free again at once
        assert again.getsockname()[1] == port


@pytest.mark.parametrize(
    ("host", "port"), [("no-such-host.invalid", 0), ("203.0.113.7", 0), ("127.0.0.1", 70_000), ("127.0.0.1", -1)]
)
def test_addresses_that_cannot_be(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=r"--(host|port)"):
        bind(host, port)


def test_ready_means_that_requests_are_taken(scripted: Make, text: ModelText) -> None:
    told: list[str] = []
    answers: list[int] = []
    app = create_app(scripted(lambda spec, index: []), text, model_ids=["m"])

    def ready(url: str) -> None:
        told.append(url)
        threading.Thread(target=lambda: answers.append(httpx.get(f"{url}/health").status_code)).start()

    server = Server(app, "127.0.0.1", 0, ready)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not answers:
        thread.join(0.01)
    server.stop()
    thread.join(20)
    assert answers == [200]
    assert told == [server.url]
    assert not server.url.endswith(":0")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_ipv6_addresses_are_bracketed(scripted: Make, text: ModelText) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 on this machine")
    app = create_app(scripted(lambda spec, index: []), text, model_ids=["m"])
    try:
        server = Server(app, "::1", 0)
    except ConfigError:
        pytest.skip("no IPv6 on this machine")
    assert server.url.startswith("http://[::1]:")
    server.stop()
    server.run()


PROGRAM = """
import sys
from tests.front.scripted import ScriptedPort
from weft.front.app import create_app
from weft.front.port import EngineInfo
from weft.front.server import serve
from weft.front.text import ModelText

info = EngineInfo(model_id="m", vocab_size=4096, max_model_len=4096, kv_blocks=9, block_tokens=16, max_num_seqs=4)
port = ScriptedPort(lambda spec, index: [300] * 5, info)  # five tokens, then nothing for ever
app = create_app(port, ModelText.load(sys.argv[1]), model_ids=["m"])
serve(app, "127.0.0.1", 0, lambda url: print(url, flush=True), drain_s=0.2)
print("ended", port.cancelled(), "torch" in sys.modules, flush=True)
"""


STREAM = {"prompt": "Hi", "stream": True, "max_tokens": 100}


def started(program: str, bundled: Path) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(bundled)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=bundled.parents[2],
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_cleanly_even_with_open_streams(bundled: Path, number: int) -> None:
    process, url = started(PROGRAM, bundled)
    with httpx.stream("POST", f"{url}/v1/completions", json=STREAM, timeout=30) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: {")
        process.send_signal(number)
        rest = "\n".join(lines)
    assert "shutting down" in rest, "an open stream is told why it ends"
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert out.strip() == "ended [1] False"  # and nothing of the front needs torch
    assert "Traceback" not in err


def test_a_second_signal_does_not_wait(bundled: Path) -> None:
    patient = PROGRAM.replace("drain_s=0.2", "drain_s=300")
    process, url = started(patient, bundled)
    with httpx.stream("POST", f"{url}/v1/completions", json=STREAM, timeout=30) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: {")
        process.send_signal(signal.SIGTERM)
        while (told := httpx.get(f"{url}/health", timeout=30).json())["status"] == "ok":
            pass
        assert told["status"] == "draining"
        process.send_signal(signal.SIGTERM)
        assert "shutting down" in "\n".join(lines)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err


@pytest.mark.parametrize("when", ["loading", "draining"])
def test_who_comes_too_early_or_too_late_hears_it_in_the_form_of_its_api(when: str) -> None:
    """Anthropic's client knows 529 and its own object, as everywhere below its routes."""
    gate = Gate(Future(), Starlette, EngineState)
    if when == "draining":
        gate.app, gate.draining = Starlette(), True

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(gate)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.post(path, json={}) for path in ("/v1/messages", "/v1/chat/completions")]

    theirs, ours = asyncio.run(ask())
    assert (ours.status_code, ours.json()["error"]["code"]) == (503, when)
    assert theirs.status_code == 529
    assert (theirs.json()["type"], theirs.json()["error"]["type"]) == ("error", "overloaded_error")
    assert theirs.json()["error"]["message"] == ours.json()["error"]["message"]
    assert theirs.headers["request-id"] == theirs.json()["request_id"]


EARLY = """
import signal, uvicorn

run = uvicorn.Server.run

def late(self, sockets=None):
    signal.raise_signal(signal.SIGTERM)
    run(self, sockets)

uvicorn.Server.run = late
"""


def test_a_signal_before_requests_are_taken_is_not_lost(bundled: Path) -> None:
    """It comes after the command has handed signals on, and before uvicorn takes them."""
    process, url = started(EARLY + PROGRAM, bundled)
    try:
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    assert url.startswith("ended"), "it was never ready"
    assert "Traceback" not in err
