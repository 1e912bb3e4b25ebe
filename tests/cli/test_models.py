"""`weft serve A B`: each model answers as it does alone, also while the other's engine is killed; names, memory, what is kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import msgspec
import openai
import pytest

from tests.cli.running import Serving, weft
from tests.cli.test_faults import Reader, body, health, streams, total, until, up
from weft.cli._models import Figures, divided, figures_of
from weft.core.ledger import parted
from weft.errors import CapacityError
from weft.exec.build import EngineConfig, prepare
from weft.exec.shadow import planned as shadowed

ENGINE = ("--threads", "1", "--max-model-len", "512")
TINY, SMALL = "weft-tiny", "small"
ENDED = ("completed", "failed", "cancelled", "expired")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, bundled: Path) -> Path:
    """The bundled draft as a model of its own: other weights and another shape, with the bundled model's words."""
    folder = tmp_path_factory.mktemp("models") / SMALL
    shutil.copytree(bundled, folder)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bundled.parent / "draft" / name, folder / name)
    return folder


def asked(model: str, **more: Any) -> list[dict[str, Any]]:
    return [body(i, model=model, **more) for i in range(10)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, small: Path) -> dict[str, list[Any]]:
    """What each answers where there is no other."""
    found = {}
    for name, model in ((TINY, "bundled"), (SMALL, str(small))):
        with Serving(tmp_path_factory.mktemp(name), model, "--port", "0", "--memory", "700M", *ENGINE) as server:
            found[name] = [r.outcome() for r in streams(server.url(), asked(name))]
            assert httpx.get(f"{server.url()}/health").json().keys() == {
                "status", "reason", "engine_pid", "engine_restarts", "last_step_s",
            }  # fmt: skip
            assert "model_name" not in httpx.get(f"{server.url()}/metrics").text
    assert found[TINY] != found[SMALL]
    return found


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("both")
    with Serving(folder, "bundled", str(small), "--port", "0", "--memory", "1200M", *ENGINE) as server:
        yield server.url()
        assert server.end(signal.SIGTERM) == 0
        assert "Traceback" not in server.err.read_text()


def engine_of(url: str, model: str) -> dict[str, Any]:
    (found,) = [one for one in health(url)["engines"] if one["model"] == model]
    return found


def figure(url: str, name: str, model: str, labels: str = "") -> float:
    page = httpx.get(f"{url}/metrics", timeout=30).text
    found = re.search(rf'^weft:{name}{{model_name="{model}"{labels}}} (\S+)$', page, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def test_both_answer_at_once_as_each_does_alone(url: str, alone: dict[str, list[Any]]) -> None:
    mixed = [request for pair in zip(asked(TINY), asked(SMALL), strict=True) for request in pair]
    before = {name: figure(url, "time_to_first_token_seconds_count", name) for name in (TINY, SMALL)}
    found = [r.outcome() for r in streams(url, mixed)]
    assert found[::2] == alone[TINY]
    assert found[1::2] == alone[SMALL]
    sequences = sum(request.get("n", 1) for request in asked(TINY))
    for name in (TINY, SMALL):
        assert figure(url, "time_to_first_token_seconds_count", name) == before[name] + sequences
        assert figure(url, "kv_blocks_total", name) > 0


def test_one_engine_is_killed_and_the_other_model_does_not_notice(url: str, alone: dict[str, list[Any]]) -> None:
    before = {name: engine_of(url, name) for name in (TINY, SMALL)}
    meanwhile: list[int] = []

    async def kill(readers: list[Reader]) -> None:
        tiny = readers[: len(alone[TINY])]
        await until(lambda: total(readers[len(tiny) :]) > 40)
        os.kill(before[SMALL]["pid"], signal.SIGKILL)
        async with httpx.AsyncClient(base_url=url) as client:
            told: dict[str, Any] = {"status": "ok"}
            while told["status"] == "ok":
                told = (await client.get("/health")).json()
            seen = total(tiny)
            assert (await client.get(f"/health?model={TINY}")).status_code == 200
            apart = await client.get(f"/health?model={SMALL}")
            assert apart.status_code in (200, 503), "it may be up again"
        assert told["reason"].startswith(f"{SMALL}: the engine died")
        await until(lambda: total(tiny) > seen + 20)
        meanwhile.append(total(tiny) - seen)

    # Twice the length of an answer for the one that goes on: it has to be under way while the other is started again.
    long = asked(TINY, max_tokens=300)
    calm = [r.outcome() for r in streams(url, long)]
    found = [r.outcome() for r in streams(url, [*long, *asked(SMALL)], kill)]
    assert found[: len(long)] == calm
    assert found[len(long) :] == alone[SMALL]
    assert meanwhile[0] > 0
    up(url)
    after = {name: engine_of(url, name) for name in (TINY, SMALL)}
    assert after[TINY] == before[TINY]
    assert after[SMALL]["restarts"] == before[SMALL]["restarts"] + 1
    assert health(url)["engine_restarts"] == after[SMALL]["restarts"]
    assert figure(url, "engine_restarts_total", SMALL) == after[SMALL]["restarts"]
    assert figure(url, "engine_restarts_total", TINY) == 0


def test_a_name_that_there_is_not(url: str) -> None:
    chat = {"model": "other", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    for path, request in {
        "/v1/chat/completions": chat, "/v1/messages": chat, "/v1/messages/count_tokens": chat,
        "/v1/completions": {"model": "other", "prompt": "Hi"}, "/v1/responses": {"model": "other", "input": "Hi"},
        "/v1/embeddings": {"model": "other", "input": "Hi"}, "/tokenize": {"model": "other", "prompt": "Hi"},
        "/detokenize": {"model": "other", "tokens": [1]},
    }.items():  # fmt: skip
        answer = httpx.post(f"{url}{path}", json=request)
        assert answer.status_code == 404, path
        error = answer.json()["error"]
        assert f"there is '{TINY}', '{SMALL}'" in error["message"]
        assert error.get("code", "model_not_found") == "model_not_found"
    for path in ("/v1/models/other", "/v1/weft/live?model=other", "/health?model=other"):
        assert httpx.get(f"{url}{path}").status_code == 404, path


def test_the_clients_of_others(url: str) -> None:
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as other,
    ):
        assert [model.id for model in client.models.list()] == [TINY, SMALL]
        assert client.models.retrieve(SMALL).id == SMALL
        texts = set()
        for name in (TINY, SMALL):
            said: Any = {
                "messages": [{"role": "user", "content": "Tell me of the sea"}],
                "extra_body": {"temperature": 0.0},
            }
            answer = client.chat.completions.create(model=name, max_tokens=20, **said)
            assert answer.model == name
            message = other.messages.create(model=name, max_tokens=20, **said)
            assert message.model == name
            block = message.content[0]
            assert block.type == "text"
            assert block.text == answer.choices[0].message.content
            texts.add(block.text)
        assert len(texts) == 2
        one, another = (client.embeddings.create(model=name, input="Hi").data[0].embedding for name in (TINY, SMALL))
        assert one != another
        first = httpx.post(f"{url}/v1/completions", json={"prompt": "Hi", "max_tokens": 1}).json()
        assert first["model"] == TINY


def test_the_feed_of_each(url: str) -> None:
    for query, name in (("", TINY), (f"?model={SMALL}", SMALL)):
        with httpx.stream("GET", f"{url}/v1/weft/live{query}", timeout=30) as answer:
            told = next(json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: "))
        assert told["models"] == [name]
        assert told["engines"] == [TINY, SMALL]


def test_what_is_not_done_goes_on_with_its_model(tmp_path: Path, small: Path) -> None:
    """The front is killed in the middle of a batch of both models and of background responses; a later one has the models in the
    other order, and just the memory that they need.  Answers are of many lengths: those of one would all end at once."""
    needed = least(small)
    flags = ("--port", "0", "--data-dir", str(tmp_path / "store"), *ENGINE)
    lines = [
        {"custom_id": f"{name}-{i}", "method": "POST", "url": "/v1/completions",
         "body": {"model": name, "prompt": f"The sea {i}", "max_tokens": 30 * (i + 1), "ignore_eos": True, "seed": i}}
        for i in range(10) for name in (TINY, SMALL)
    ]  # fmt: skip
    lines.append({**lines[0], "custom_id": "nobody", "body": {**lines[0]["body"], "model": "nobody"}})  # type: ignore[dict-item]
    later = {"input": "Tell me of the sea", "max_output_tokens": 150, "temperature": 0.0, "background": True}
    with Serving(tmp_path, "bundled", str(small), "--memory", "1200M", *flags) as server:
        at = server.url()
        data = "".join(json.dumps(line) + "\n" for line in lines)
        form: Any = {"files": {"file": ("in.jsonl", data)}, "data": {"purpose": "batch"}}
        file = httpx.post(f"{at}/v1/files", **form).json()["id"]
        given = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = httpx.post(f"{at}/v1/batches", json=given).json()["id"]
        responses = {
            n: httpx.post(f"{at}/v1/responses", json={"model": n, **later}).json()["id"] for n in (SMALL, TINY)
        }
        while httpx.get(f"{at}/v1/batches/{batch}").json()["request_counts"]["completed"] < 3:
            assert server.process.poll() is None
        server.process.kill()
        server.process.wait()
    with Serving(tmp_path, str(small), "bundled", "--memory", str(needed), *flags) as server:
        at = server.url()
        assert httpx.get(f"{at}/v1/batches/{batch}").json()["request_counts"]["completed"] < 20
        told: dict[str, Any] = {}
        while told.get("status") not in ENDED:
            told = httpx.get(f"{at}/v1/batches/{batch}").json()
        assert told["status"] == "completed"
        assert told["request_counts"] == {"total": 21, "completed": 20, "failed": 1}
        found = httpx.get(f"{at}/v1/files/{told['output_file_id']}/content").text.splitlines()
        answers = {row["custom_id"]: row["response"]["body"] for row in map(json.loads, found)}
        (wrong,) = httpx.get(f"{at}/v1/files/{told['error_file_id']}/content").text.splitlines()
        assert json.loads(wrong)["response"]["body"]["error"]["code"] == "model_not_found"
        for line in lines[:4] + lines[-7:-1]:
            direct = httpx.post(f"{at}/v1/completions", json=line["body"], timeout=60).json()
            answer = answers[str(line["custom_id"])]
            assert (answer["model"], answer["choices"]) == (line["body"]["model"], direct["choices"])  # type: ignore[index]
        texts = set()
        for name, id in responses.items():
            kept: dict[str, Any] = {}
            while kept.get("status") not in ("completed", "incomplete", "failed"):
                kept = httpx.get(f"{at}/v1/responses/{id}").json()
            direct = httpx.post(
                f"{at}/v1/responses", json={**later, "model": name, "background": False}, timeout=60
            ).json()
            assert kept["model"] == name
            assert kept["output"][0]["content"][0]["text"] == direct["output"][0]["content"][0]["text"]
            texts.add(kept["output"][0]["content"][0]["text"])
        assert len(texts) == 2
        assert server.end(signal.SIGTERM) == 0


def least(small: Path) -> int:
    """The least memory that both take: what is allowed and what is missing, as the refusal names them."""
    done = weft("serve", "bundled", str(small), "--port", "0", "--memory", "700M", *ENGINE)
    assert done.returncode == 1
    found = re.search(r"--memory allows 700.0 MiB: (\d+) bytes are missing", done.stderr)
    assert found is not None, done.stderr
    one_less = weft(
        "serve", "bundled", str(small), "--port", "0", "--memory", str((700 << 20) + int(found[1]) - 1), *ENGINE
    )
    assert ": 1 bytes are missing" in one_less.stderr
    return (700 << 20) + int(found[1])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("bundled", "bundled"), "two of the models have the name 'weft-tiny'"),
        (("bundled", "bundled", "--served-model-name", "a"), "2 models and 1 names"),
        (("bundled", "bundled", *("--served-model-name", "a") * 2), "two of the models have the name 'a'"),
        (("--replicas", "2"), "leave --replicas and --roles out"),
        (("--roles", "prefill=1,decode=1"), "leave --replicas and --roles out"),
        (("--record", "x"), "serve one model alone"),
        (("--lora", "x=y"), "leave --lora and --lora-root out"),
        (("--lora-root", "."), "leave --lora and --lora-root out"),
        (("--with", "draft=speculative_sampling(model='bundled')"), "a: a draft with a model of its own"),
        (("--max-model-len", "0"), "--max-model-len must be at least 1"),
        (("--kv", "none"), "a: --kv is auto"),
    ],
)
def test_what_does_not_go(flags: tuple[str, ...], said: str) -> None:
    named = ("bundled", "bundled", "--served-model-name", "a", "--served-model-name", "b")
    done = weft("serve", "--port", "0", *(flags if "bundled" in flags else (*named, *flags)))
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_models_of_a_file(tmp_path: Path, small: Path) -> None:
    (tmp_path / "serve.toml").write_text(f'model = ["bundled", "{small}"]\nserved-model-name = ["x", "x"]\n')
    assert "have the name 'x'" in weft("serve", "--config", str(tmp_path / "serve.toml")).stderr


def test_the_rest_is_parted_by_what_sequences_need() -> None:
    """By hand: 100 bytes, needs 1 : 3."""
    assert parted(100, [10, 30], [1000, 1000]) == [25, 75]
    assert parted(100, [10, 30], [20, 1000]) == [20, 80]
    assert parted(100, [10, 30], [20, 40]) == [20, 40]
    assert parted(40, [10, 30], [1000, 1000]) == [10, 30], "each holds its longest sequence"
    assert sum(parted(101, [7, 7, 7], [1000] * 3)) <= 101


def test_memory_by_hand() -> None:
    figures = [
        Figures(fixed=100, need=10, usual=40, most=640, length=512, available=1000),
        Figures(fixed=300, need=30, usual=60, most=1920, length=512, available=1000),
    ]
    names = ["a", "b"]
    assert divided(figures, names, 800) == [100 + 100, 300 + 300]
    assert divided(figures, names, 5000) == [100 + 150, 300 + 450], "no more than there is"
    assert divided(figures, names, None) == [140, 360], "the usual pools, where they fit"
    assert divided(figures, names, 440) == [110, 330]
    with pytest.raises(CapacityError, match="1 bytes are missing"):
        divided(figures, names, 439)
    figures[1].checks = 60  # which an engine takes beside its memory
    assert divided(figures, names, 500) == [110, 330]
    with pytest.raises(CapacityError, match="1 bytes are missing"):
        divided(figures, names, 499)


def test_shadow_checks_are_planned_too(bundled: Path) -> None:
    """As the engine itself widens its plan by them, whatever its pool has."""
    options = {"max_model_len": 512, "threads": 1}
    plain, checked = (figures_of(bundled, options, checked=one) for one in (False, True))
    assert plain.checks == 0
    assert msgspec.structs.replace(checked, checks=0, available=0) == msgspec.structs.replace(plain, available=0)
    setup = prepare(EngineConfig(model=bundled, max_model_len=512, threads=1, memory_bytes=700 << 20))
    assert shadowed(setup).plan.total_bytes - setup.plan.total_bytes == checked.checks > 0
