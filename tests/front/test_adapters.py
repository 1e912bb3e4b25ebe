"""Adapters over HTTP: loaded and dropped as vLLM has it, used as models, and never read from outside their folder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.front.conftest import serving
from tests.front.scripted import ScriptedPort
from weft import LLM, AsyncLLM, SamplingParams
from weft.adapt.lora import LoRA
from weft.errors import ConfigError, RequestError
from weft.exec.build import EngineConfig, build, prepare
from weft.exec.thread import EngineThread
from weft.front.port import EngineInfo
from weft.front.text import ModelText
from weft.llm import engine_info
from weft.types import Adapted, Load, Tokens

PROMPT = "Once upon a time, there was a little"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    (folder / "one").mkdir()
    LoRA.trial(folder / "one")
    return folder


@pytest.fixture(scope="module")
def port(bundled: Path, root: Path) -> Iterator[EngineThread]:
    config = EngineConfig(
        model=bundled, max_num_seqs=8, threads=1, max_model_len=1024, max_loras=2, lora=[f"first={root / 'one'}"]
    )
    setup = prepare(config)
    runtime = build(setup)
    info = engine_info(setup, "weft-tiny", runtime.adapters, loads_adapters=True)
    made = EngineThread(runtime.engine, runtime.executor, info, adapters=runtime.adapters, adapter_root=str(root))
    yield made
    made.close()


@pytest.fixture(scope="module")
def http(port: EngineThread, text: ModelText) -> Iterator[httpx.Client]:
    with serving(port, text) as address, httpx.Client(base_url=address, timeout=60) as made:
        yield made


def load(http: httpx.Client, name: str, path: str) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})


def unload(http: httpx.Client, name: str) -> httpx.Response:
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def complete(http: httpx.Client, model: str | None, **more: object) -> httpx.Response:
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, **({} if model is None else {"model": model}), **more}
    return http.post("/v1/completions", json=body)


def test_an_adapter_comes_answers_and_goes(http: httpx.Client, root: Path) -> None:
    with LLM(dtype="float32", threads=1, max_num_seqs=2, lora=[f"x={root / 'one'}"]) as llm:
        law = SamplingParams(max_tokens=8, temperature=0)
        plain, adapted = (llm.generate(PROMPT, law, adapter=a)[0].outputs[0].text for a in (None, "x"))
        mixed = llm.generate([PROMPT, PROMPT], law, adapter=["x", None])
        assert [o.outputs[0].text for o in mixed] == [adapted, plain]
        assert [o.outputs[0].text for o in llm.stream(PROMPT, law, adapter="x")][-1] == adapted
    assert plain != adapted
    done = load(http, "second", "one")
    assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'second' added successfully.")
    models = {m["id"]: m for m in http.get("/v1/models").json()["data"]}
    assert {name: m["parent"] for name, m in models.items()} == {
        "weft-tiny": None,
        "first": "weft-tiny",
        "second": "weft-tiny",
    }
    assert http.get("/v1/models/second").json() == models["second"]
    told = {}
    for model, wanted in (("weft-tiny", plain), ("first", adapted), ("second", adapted), (None, plain)):
        answer = complete(http, model).json()
        assert answer["choices"][0]["text"] == wanted
        assert answer["model"] == (model or "weft-tiny")
        told[model] = answer["system_fingerprint"]
    assert told["first"] == told["second"] != told["weft-tiny"]
    chat = {
        "model": "second",
        "max_tokens": 3,
        "messages": [{"role": "user", "content": "Hello"}],
        "weft": {"label": True},
    }
    answer = http.post("/v1/chat/completions", json=chat)
    assert answer.status_code == 200
    assert "adapt=lora(name='second')" in answer.json()["weft"]["stack"], (
        "the label names what the model's name stands for"
    )
    assert "adapt=lora(name='first')" in complete(http, "first", weft={"label": True}).json()["weft"]["stack"]
    assert not any("lora" in part for part in complete(http, None, weft={"label": True}).json()["weft"]["stack"])
    assert unload(http, "second").text == "Success: LoRA adapter 'second' removed successfully."
    gone = complete(http, "second")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert http.get("/v1/models/second").status_code == 404


@pytest.mark.parametrize("path", ["/etc", "..", "../..", "one/../../x", "link", "/proc/self"])
def test_paths_that_lead_out(http: httpx.Client, root: Path, path: str, tmp_path: Path) -> None:
    link = root / "link"
    if not link.is_symlink():
        link.symlink_to(tmp_path)
    answer = load(http, "evil", path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"lora_name": "x"}, 400, "lora_path"),
        ({"lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "weft-tiny", "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "a b", "lora_path": "one"}, 400, None),
        ({"lora_name": "x", "lora_path": "nobody"}, 400, None),
        ({"lora_name": "x", "lora_path": "on\0e"}, 400, None),
        ({"lora_name": 3, "lora_path": "one"}, 400, "lora_name"),
    ],
)
def test_bodies_that_are_wrong(http: httpx.Client, body: dict[str, object], status: int, param: str | None) -> None:
    answer = http.post("/v1/load_lora_adapter", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert error["type"] == "invalid_request_error"
    assert complete(http, "first").status_code == 200, "the engine lives on"


def test_what_cannot_be_dropped_or_held(http: httpx.Client) -> None:
    absent = unload(http, "nobody")
    assert (absent.status_code, absent.json()["error"]["code"]) == (404, "adapter_not_found")
    assert load(http, "second", "one").status_code == 200
    full = load(http, "third", "one")
    assert (full.status_code, full.json()["error"]["code"]) == (503, "overloaded")
    assert "max-loras" in full.json()["error"]["message"]
    body = {"model": "second", "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()  # held, as letting it go would end the stream
        next(lines)
        busy = unload(http, "second")
        assert (busy.status_code, busy.json()["error"]["code"]) == (409, "adapter_in_use")
    for _ in range(100):  # the client has gone; its request goes within a step or two
        gone = unload(http, "second")
        if gone.status_code == 200:
            break
        time.sleep(0.05)
    assert gone.status_code == 200


def test_without_a_folder_the_routes_are_closed(scripted: Callable[..., ScriptedPort], text: ModelText) -> None:
    with serving(scripted(lambda spec, index: [5]), text) as address, httpx.Client(base_url=address) as http:
        for answer in (load(http, "x", "/etc"), unload(http, "x")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
            assert "--lora-root" in answer.json()["error"]["message"]


def test_an_engine_without_a_folder_refuses_by_itself(port: EngineThread) -> None:
    """Whoever speaks to the engine's port directly meets the same refusal."""
    from weft.exec.desk import AdapterDesk

    desk = AdapterDesk(None, None, lambda read: None)  # type: ignore[arg-type]
    (told,) = desk.take(Load(7, "x", "/etc"))
    assert isinstance(told, Adapted)
    assert (told.id, told.code) == (7, "forbidden")
    desk.close()


def test_a_name_is_the_models_or_an_adapters(
    info: EngineInfo, text: ModelText, scripted: Callable[..., ScriptedPort]
) -> None:
    from weft.front.app import create_app

    port = scripted(lambda spec, index: [5])
    port._info = EngineInfo(
        model_id="m", vocab_size=9, max_model_len=9, kv_blocks=1, block_tokens=16, max_num_seqs=1,
        adapters=(Adapted(0, "same", "adapt=lora(name='same')"),),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="names the model and an adapter"):
        create_app(port, text, model_ids=["same"])


def test_python_loads_and_drops(root: Path) -> None:
    with LLM(dtype="float32", threads=1, max_num_seqs=2) as llm:
        with pytest.raises(ConfigError, match="no adapter 'x'"):
            llm.generate(PROMPT, adapter="x")
        llm.load_adapter("x", root / "one")
        assert llm.adapters == ["x"]
        stream = llm.stream(PROMPT, SamplingParams(max_tokens=5), adapter="x")
        next(stream)
        with pytest.raises(RequestError, match="used by 1 live request"):
            llm.drop_adapter("x")
        stream.close()
        llm.drop_adapter("x")
        assert llm.adapters == []


def test_asyncio_loads_and_drops(root: Path) -> None:
    async def main() -> tuple[str, str]:
        async with AsyncLLM(dtype="float32", threads=1, max_num_seqs=2) as llm:
            law = SamplingParams(max_tokens=6, temperature=0)
            await llm.load_adapter("x", root / "one")
            assert llm.adapters == ["x"]
            found = []
            for adapter in (None, "x"):
                grown = [out.outputs[0].text async for out in llm.generate(PROMPT, law, adapter=adapter)]
                found.append(grown[-1])
            await llm.drop_adapter("x")
            with pytest.raises(RequestError, match="no adapter 'x'"):
                async for _ in llm.generate(PROMPT, law, adapter="x"):
                    pass
            with pytest.raises(RequestError, match="adapter_config"):
                await llm.load_adapter("y", "/nowhere")
            return found[0], found[1]

    plain, adapted = asyncio.run(main())
    assert plain != adapted


def test_tokens_flow_while_an_adapter_is_read(port: EngineThread, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading has a thread of its own: a slow disk holds no step up."""
    from weft.exec import adapters

    files = adapters._files
    frames: list[float] = []

    def slow(*given: object) -> object:
        time.sleep(0.5)
        frames.append(-1.0)
        return files(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(adapters, "_files", slow)
    from weft.types import Add, Cancel, RequestSpec, SamplingSpec, TokenItem

    told: list[object] = []
    sink = port._sink
    port.subscribe(lambda frame: [told.append(e) or frames.append(1.0) for e in frame.events])  # type: ignore[func-returns-value]
    port.send(Add(RequestSpec(id=10**9, items=(TokenItem((5, 6)),), sampling=SamplingSpec(max_tokens=900))))
    port.send(Load(10**9 + 1, "slow", str(root / "one")))
    end = time.monotonic() + 20
    while not any(isinstance(e, Adapted) for e in told):
        assert time.monotonic() < end
        time.sleep(0.01)
    port.send(Cancel(10**9))
    port._sink = sink
    assert sum(isinstance(e, Tokens) for e in told) >= 3
    assert frames.index(-1.0) >= 3, "no token came before the file was read"
    (answer,) = [e for e in told if isinstance(e, Adapted)]
    assert (answer.error, answer.part) == (None, "adapt=lora(name='slow')")
