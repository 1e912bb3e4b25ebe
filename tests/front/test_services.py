"""Several models of one application: who is asked, what is counted apart and what together, and one that has ended for good."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.front.conftest import serving
from tests.front.scripted import ScriptedPort, wait_until
from tests.front.test_batches import ended, jsonl, line, rows, start
from weft.errors import CapacityError, ConfigError
from weft.front.admission import Bounds
from weft.front.app import Served, create_app
from weft.front.port import STOPPED, EngineInfo, EngineState
from weft.front.several import Several
from weft.front.store import open_store
from weft.front.text import ModelText

Make = Callable[..., ScriptedPort]


def body(model: Any, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "Hi", "max_tokens": 3, **more}


@pytest.fixture
def two(scripted: Make) -> tuple[ScriptedPort, ScriptedPort]:
    """Engines that say Y and Z."""
    return tuple(scripted(lambda spec, index, id=id: [id] * spec.sampling.max_tokens) for id in (66, 67))  # type: ignore[misc,return-value]


def test_the_model_of_a_body_is_who_is_asked(two: tuple[ScriptedPort, ScriptedPort], text: ModelText) -> None:
    first, second = two
    with (
        serving(first, text, model_ids=["a", "alias"], others=[Served(second, text, ["b"])]) as url,
        httpx.Client(base_url=url) as http,
    ):
        assert [m["id"] for m in http.get("/v1/models").json()["data"]] == ["a", "alias", "b"]
        for model, port in (("a", first), ("alias", first), ("b", second), (None, first)):
            before = len(port.commands)
            assert http.post("/v1/completions", json=body(model)).status_code == 200, model
            assert len(port.commands) == before + 1, model
        twice = b'{"model": "a", "prompt": "Hi", "max_tokens": 1, "model": "b"}'
        answer = http.post("/v1/completions", content=twice, headers={"content-type": "application/json"})
        assert answer.json()["model"] == "b", "readers of JSON take the last of two"
        # What is wrong with a body is said in the words that a single model has for it.
        for wrong in (b"{", b"[1]", b'"x"', b'{"model": 3, "prompt": "Hi"}', b'{"model": {"a": [1]}}', b"\xff", b""):
            answer = http.post("/v1/completions", content=wrong, headers={"content-type": "application/json"})
            assert answer.status_code == 400, wrong
        assert len(second.commands) == 2


def test_two_of_one_name(two: tuple[ScriptedPort, ScriptedPort], text: ModelText) -> None:
    with pytest.raises(ConfigError, match="two of the models have the name 'a'"):
        create_app(two[0], text, model_ids=["x", "a"], others=[Served(two[1], text, ["a"])])


def test_queues_are_apart_and_rates_are_one(scripted: Make, text: ModelText) -> None:
    silent = scripted(lambda spec, index: [])
    answering = scripted(lambda spec, index: [65] * spec.sampling.max_tokens)
    others = [Served(answering, text, ["b"])]
    bounds = Bounds(max_queue=1, requests_per_minute=3)
    with (
        ThreadPoolExecutor(1) as pool,
        serving(silent, text, model_ids=["a"], others=others, bounds=bounds) as url,
        httpx.Client(base_url=url) as http,
    ):
        waiting = pool.submit(httpx.post, f"{url}/v1/completions", json=body("a"), timeout=30)
        assert wait_until(lambda: bool(silent.commands))
        full = http.post("/v1/completions", json=body("a"))
        assert (full.status_code, full.json()["error"]["code"]) == (503, "overloaded")
        assert [http.post("/v1/completions", json=body("b")).status_code for _ in range(4)] == [200, 200, 429, 429]
        assert not waiting.done()


def test_an_engine_that_has_ended_for_good_takes_only_its_model_along(
    tmp_path: Path, two: tuple[ScriptedPort, ScriptedPort], text: ModelText, scripted: Make
) -> None:
    """Its lines of a batch wait for the next server, those of the other are answered."""
    first, second = two
    others = [Served(second, text, ["b"])]
    lines = [line(i, {**body("ba"[i % 2])}, "/v1/completions") for i in range(6)]
    with serving(first, text, model_ids=["a"], others=others, store=open_store(tmp_path)) as url:
        second.die("it cannot be started again")
        refused = httpx.post(f"{url}/v1/completions", json=body("b"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_stopped")
        assert httpx.post(f"{url}/v1/completions", json=body("a")).json()["choices"][0]["text"] == "YYY"
        health = httpx.get(f"{url}/health")
        assert health.status_code == 503
        assert health.json()["reason"] == f"b: {STOPPED}"
        assert [(one["model"], one["status"]) for one in health.json()["engines"]] == [("a", "ok"), ("b", "stalled")]
        assert httpx.get(f"{url}/health?model=a").status_code == 200
        assert httpx.get(f"{url}/ready?model=b").status_code == 503
        id = start(url, jsonl(lines), "/v1/completions")
        counts = f"{url}/v1/batches/{id}"
        assert wait_until(lambda: httpx.get(counts).json()["request_counts"]["completed"] == 3)
        assert httpx.get(counts).json()["status"] == "in_progress"
    again = scripted(lambda spec, index: [67] * spec.sampling.max_tokens)
    with serving(again, text, model_ids=["b"], others=[Served(first, text, ["a"])], store=open_store(tmp_path)) as url:
        batch = ended(url, id)
        found = rows(url, batch["output_file_id"])
    assert [row["response"]["body"]["choices"][0]["text"] for row in found] == ["ZZZ", "YYY"] * 3


class Coming:
    """An engine as the gate sees it."""

    def __init__(self) -> None:
        self.started: Future[EngineInfo] = Future()
        self.ended: str | None = None

    def state(self, stall_s: float) -> EngineState:
        return EngineState() if self.started.done() else EngineState(status="loading", reason="it is being loaded")

    def error(self) -> str | None:
        return self.ended


def test_all_have_to_come_up_and_the_last_one_ends_it(info: EngineInfo) -> None:
    ports: Any = {"a": Coming(), "b": Coming()}
    both = Several(ports)
    ports["b"].started.set_result(info)
    assert not both.started.done()
    state = both.state(1.0)
    assert (state.status, state.reason) == ("loading", "a: it is being loaded")
    ports["a"].started.set_result(info)
    assert both.started.result(0) is None
    assert both.state(1.0).status == "ok"
    ports["a"].ended = "gone"
    assert both.error() is None
    ports["b"].ended = "gone too"
    assert both.error() == "gone too"


def test_one_that_cannot_be_built_is_named() -> None:
    ports: Any = {"a": Coming(), "b": Coming()}
    both = Several(ports)
    ports["b"].started.set_exception(CapacityError("it does not fit"))
    ports["a"].started.set_exception(ConfigError("and this is late"))
    with pytest.raises(CapacityError, match=r"^b: it does not fit$"):
        both.started.result(0)
