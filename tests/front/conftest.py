"""Servers for the tests of the front: over the real engine with the bundled model, and over scripted ones."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.front.scripted import Script, ScriptedPort
from weft.front.app import create_app
from weft.front.port import EngineInfo, EnginePort
from weft.front.server import Server
from weft.front.store import open_store
from weft.front.text import ModelText

MODEL = "weft-tiny"
CONTEXT = 1024


@pytest.fixture(scope="session")
def openai_schemas(shared: Callable[[str], Path]) -> dict[str, Any]:
    """Those of OpenAI's own description."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: dict[str, Any] = yaml.load(shared("data/api/openapi.yaml").read_text(), Loader=loader)["components"][
        "schemas"
    ]
    return found


@contextlib.contextmanager
def serving(port: EnginePort, text: ModelText, **options: Any) -> Iterator[str]:
    """A real HTTP server over an engine, in a thread; its address."""
    ready = threading.Event()
    app = create_app(port, text, **{"model_ids": [MODEL], **options})
    server = Server(app, "127.0.0.1", 0, lambda _: ready.set())
    thread = threading.Thread(target=server.run, name="weft-test-server")
    thread.start()
    try:
        assert ready.wait(20)
        yield server.url
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def text(bundled: Path) -> ModelText:
    return ModelText.load(bundled, name=MODEL)


@pytest.fixture(scope="session")
def info(text: ModelText) -> EngineInfo:
    """What a scripted engine says of itself: the bundled model with a shorter context."""
    return EngineInfo(
        model_id=MODEL, vocab_size=text.vocab_size, max_model_len=512, kv_blocks=64, block_tokens=16, max_num_seqs=8
    )


@pytest.fixture
def scripted(info: EngineInfo) -> Iterator[Callable[..., ScriptedPort]]:
    """`scripted(script, ...)` makes a scripted engine, closed at the end of the test."""
    ports: list[ScriptedPort] = []

    def make(script: Script, **options: Any) -> ScriptedPort:
        ports.append(ScriptedPort(script, info, **options))
        return ports[-1]

    yield make
    for port in ports:
        port.close()


@pytest.fixture(scope="session")
def engine(bundled: Path, text: ModelText) -> Iterator[EnginePort]:
    """The real engine with the bundled model; a pool so small that many requests have to take turns."""
    from weft.exec.build import EngineConfig, build, prepare
    from weft.exec.thread import EngineThread
    from weft.llm import engine_info

    config = EngineConfig(model=bundled, max_num_seqs=32, threads=1, max_model_len=CONTEXT)
    plan = prepare(config).plan
    pool = 3 * CONTEXT * plan.kv_bytes_per_token
    setup = prepare(replace(config, memory_bytes=plan.total_bytes - plan.kv_bytes + pool))
    runtime = build(setup, vocabulary=text.vocabulary)
    info = engine_info(setup, MODEL)
    port = EngineThread(runtime.engine, runtime.executor, info)
    yield port
    port.close()


@pytest.fixture(scope="session")
def url(engine: EnginePort, text: ModelText, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real server."""
    store = open_store(tmp_path_factory.mktemp("store"))
    with serving(engine, text, model_ids=[MODEL, "alias"], store=store) as address:
        yield address


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[openai.OpenAI]:
    """The real client on the real server; it does not hide errors by trying again."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="session")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as made:
        yield made


def metric(http: httpx.Client, name: str) -> float:
    """The value of one sample of /metrics."""
    for line in http.get("/metrics").text.splitlines():
        if line.startswith(name + " "):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no sample {name}")
