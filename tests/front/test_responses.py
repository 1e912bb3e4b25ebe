"""/v1/responses: OpenAI's client on the real server, the order of events, what is kept for whom, and what survives an end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.front.conftest import MODEL, serving
from tests.front.scripted import ScriptedPort, wait_until
from weft.front.store import open_store
from weft.front.store.database import StoreFull
from weft.front.text import ModelText

ASK: dict[str, Any] = {"model": MODEL, "input": "Hello there", "max_output_tokens": 8, "seed": 1, "ignore_eos": True}


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, each with the name that its own data has."""
    found = []
    for block in answer.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def poll(client: openai.OpenAI, id: str) -> Any:
    assert wait_until(lambda: client.responses.retrieve(id).status not in ("queued", "in_progress"), 20)
    return client.responses.retrieve(id)


def test_an_answer_is_that_of_chat(client: openai.OpenAI) -> None:
    said = client.responses.create(**{k: v for k, v in ASK.items() if k not in ("seed", "ignore_eos")},
                                   instructions="Be kind.", extra_body={"seed": 1, "ignore_eos": True})  # fmt: skip
    chat = client.chat.completions.create(
        model=MODEL, max_tokens=8, seed=1, extra_body={"ignore_eos": True},
        messages=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello there"}],
    )  # fmt: skip
    assert said.output_text == chat.choices[0].message.content != ""
    assert said.status == "incomplete"
    assert said.incomplete_details is not None
    assert said.incomplete_details.reason == "max_output_tokens"
    assert chat.usage is not None
    assert said.usage is not None
    assert (said.usage.input_tokens, said.usage.output_tokens) == (chat.usage.prompt_tokens, 8)


def test_a_conversation_goes_on_from_what_is_stored(client: openai.OpenAI, http: httpx.Client) -> None:
    first = client.responses.create(model=MODEL, input="Hello", max_output_tokens=5)
    second = client.responses.create(
        model=MODEL, input=[{"role": "user", "content": [{"type": "input_text", "text": "Go on"}]}],
        previous_response_id=first.id, max_output_tokens=5, temperature=0,
    )  # fmt: skip
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Go on"},
    ]
    chat = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5, temperature=0)  # type: ignore[arg-type]
    assert second.output_text == chat.choices[0].message.content
    items = client.responses.input_items.list(second.id)
    assert [item.content[0].text for item in items] == ["Go on"]  # type: ignore[union-attr]
    assert client.responses.retrieve(second.id).output_text == second.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="goes on from it"):
        client.responses.create(model=MODEL, input="More", previous_response_id=second.id)


def test_what_a_request_goes_on_from_is_bounded_in_bytes(
    tmp_path: Path, text: ModelText, scripted: Callable[..., ScriptedPort], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thoughts that a template does not write count for no token, and are read all the same with each that goes on from them."""
    monkeypatch.setattr("weft.front.store.responses.MAX_CHAIN_BYTES", 100_000)
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x" * 40_000}]}
    said = [thought, {"role": "assistant", "content": "Well"}, {"role": "user", "content": "Hi"}]
    statuses, before = [], None
    with serving(
        scripted(lambda spec, index: [65] * spec.sampling.max_tokens), text, store=open_store(tmp_path)
    ) as url:
        for _ in range(4):
            body = {**ASK, "input": said, **({"previous_response_id": before} if before else {})}
            answer = httpx.post(f"{url}/v1/responses", json=body)
            statuses.append(answer.status_code)
            before = answer.json().get("id")
    assert statuses == [200, 200, 200, 400]
    assert answer.json()["error"]["param"] == "previous_response_id"
    assert "send it as input" in answer.json()["error"]["message"]


def test_store_false_keeps_nothing(client: openai.OpenAI) -> None:
    said = client.responses.create(model=MODEL, input="Hello", max_output_tokens=3, store=False)
    assert said.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(said.id)


def test_events_have_openais_names_and_order(http: httpx.Client) -> None:
    events = events_of(http.post("/v1/responses", json={**ASK, "stream": True, "top_logprobs": 1}))
    kinds = [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert len(deltas) > 2
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    whole = http.post("/v1/responses", json={**ASK, "top_logprobs": 1}).json()
    (part,) = whole["output"][0]["content"]
    assert "".join(event["delta"] for event in deltas) == part["text"]
    assert [entry for event in deltas for entry in event["logprobs"]] == part["logprobs"]
    assert len(part["logprobs"]) == 8
    last = events[-1]["response"]
    assert last["output"][0]["content"] == [part]
    assert http.get(f"/v1/responses/{last['id']}").json() == last


def test_the_official_client_streams(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="Hello", extra_body={"stop": " "}) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text


def test_background_is_polled_streamed_and_cancelled(client: openai.OpenAI, http: httpx.Client) -> None:
    made = client.responses.create(model=MODEL, input="Hello", max_output_tokens=5, background=True)
    assert made.status == "queued"
    assert poll(client, made.id).output_text
    long = {**ASK, "max_output_tokens": 900, "background": True}
    id = http.post("/v1/responses", json=long).json()["id"]
    with http.stream("GET", f"/v1/responses/{id}", params={"stream": "true", "starting_after": "1"}) as stream:
        first = next(line for line in stream.iter_lines() if line.startswith("data: "))
        assert json.loads(first[6:])["sequence_number"] == 2
    assert client.responses.cancel(id).status == "cancelled"
    assert client.responses.retrieve(id).status == "cancelled"
    assert client.responses.cancel(id).status == "cancelled"
    stored = http.post("/v1/responses", json=ASK).json()["id"]
    assert http.post(f"/v1/responses/{stored}/cancel").status_code == 400


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1/"}]}]},
            "input",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True, "store": False}, "background"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"previous_response_id": "resp_unknown"}, "previous_response_id"),
        ({"max_output_tokens": 0}, "max_tokens"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/responses", json={**ASK, **change})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_responses_outlive_the_server_and_belong_to_a_key(
    tmp_path: Path, text: ModelText, scripted: Callable[..., ScriptedPort]
) -> None:
    port = scripted(lambda spec, index: [65] * spec.sampling.max_tokens)
    keys = ["one", "two"]

    def ask(url: str, key: str, method: str = "GET", path: str = "", **more: Any) -> httpx.Response:
        return httpx.request(method, f"{url}/v1/responses{path}", headers={"x-api-key": key}, **more)

    with serving(port, text, api_key=keys, store=open_store(tmp_path)) as url:
        made = ask(url, "one", "POST", json=ASK).json()
    with serving(port, text, api_key=keys, store=open_store(tmp_path)) as url:
        assert ask(url, "one", path=f"/{made['id']}").json() == made
        assert ask(url, "three", path=f"/{made['id']}").status_code == 401
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            assert ask(url, "two", method, f"/{made['id']}{path}").status_code == 404
        follow = {**ASK, "previous_response_id": made["id"]}
        refused = ask(url, "two", "POST", json=follow)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "previous_response_not_found")
        assert ask(url, "one", "POST", json=follow).status_code == 200


@pytest.mark.parametrize("dies", [False, True])
def test_a_background_response_goes_on_at_the_next_start(
    tmp_path: Path, text: ModelText, scripted: Callable[..., ScriptedPort], dies: bool
) -> None:
    """Whether the server ends in good order, or its engine dies before."""
    open_ended = scripted(lambda spec, index: [65] * 3)  # never comes to its end
    with serving(open_ended, text, store=open_store(tmp_path)) as url:
        made = httpx.post(f"{url}/v1/responses", json={**ASK, "background": True}).json()
        assert wait_until(lambda: httpx.get(f"{url}/v1/responses/{made['id']}").json()["status"] == "in_progress")
        if dies:
            open_ended.die("the engine is gone")
            assert wait_until(lambda: httpx.get(f"{url}/v1/responses/{made['id']}").json()["status"] == "queued")
    port = scripted(lambda spec, index: [65] * spec.sampling.max_tokens)
    with serving(port, text, store=open_store(tmp_path)) as url:
        path = f"{url}/v1/responses/{made['id']}"
        assert wait_until(lambda: httpx.get(path).json()["status"] == "incomplete")
        assert httpx.get(path).json()["created_at"] == made["created_at"]


@pytest.mark.parametrize("how", ["another model", "another version", "a full disk"])
def test_a_background_response_that_cannot_go_on_keeps_no_server_from_starting(
    tmp_path: Path, text: ModelText, scripted: Callable[..., ScriptedPort], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with serving(scripted(lambda spec, index: [65] * 3), text, store=open_store(tmp_path)) as url:
        made = httpx.post(f"{url}/v1/responses", json={**ASK, "background": True}).json()
    store = open_store(tmp_path)
    request = {"input": 7} if how == "another version" else {**ASK, "model": "gone"}
    change = "UPDATE responses SET request = ?", (json.dumps(request).encode(),)
    store.responses._database.run_now(lambda db: db.execute(*change))

    async def full(_: object) -> None:
        raise StoreFull("no room")

    if how == "a full disk":
        monkeypatch.setattr(store.responses, "put", full)
    port = scripted(lambda spec, index: [65] * spec.sampling.max_tokens)
    with serving(port, text, store=store) as url:
        told = httpx.get(f"{url}/v1/responses/{made['id']}").json()
        assert told["status"] == ("queued" if how == "a full disk" else "failed")
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_the_oldest_go(tmp_path: Path, text: ModelText, scripted: Callable[..., ScriptedPort]) -> None:
    port = scripted(lambda spec, index: [65] * spec.sampling.max_tokens)
    with serving(port, text, store=open_store(tmp_path, max_responses=3)) as url:
        ids = [httpx.post(f"{url}/v1/responses", json=ASK).json()["id"] for _ in range(5)]
        found = [httpx.get(f"{url}/v1/responses/{id}").status_code for id in ids]
        assert found == [404, 404, 200, 200, 200]


def test_a_full_store_still_answers_and_says_so(
    tmp_path: Path, text: ModelText, scripted: Callable[..., ScriptedPort]
) -> None:
    port = scripted(lambda spec, index: [65] * spec.sampling.max_tokens)
    store = open_store(tmp_path)
    store.responses._database.run_now(lambda db: db.execute("PRAGMA max_page_count=1"))
    with serving(port, text, store=store) as url:
        big = {**ASK, "input": "x" * 20_000, "instructions": "a"}
        big["input"] = "Hello"
        big["metadata"] = {f"k{i}": "v" * 512 for i in range(16)}
        answer = httpx.post(f"{url}/v1/responses", json=big).json()
        assert answer["store"] is False
        assert answer["output"]
        assert httpx.post(f"{url}/v1/responses", json={**big, "background": True}).status_code == 507


def test_without_a_store(text: ModelText, scripted: Callable[..., ScriptedPort]) -> None:
    port = scripted(lambda spec, index: [65] * spec.sampling.max_tokens)
    with serving(port, text) as url:
        assert httpx.post(f"{url}/v1/responses", json=ASK).json()["store"] is False
        assert httpx.get(f"{url}/v1/responses/resp_x").status_code == 501
        assert httpx.post(f"{url}/v1/responses", json={**ASK, "background": True}).status_code == 501


def test_a_client_that_goes_away_ends_its_response(
    tmp_path: Path, text: ModelText, scripted: Callable[..., ScriptedPort]
) -> None:
    port = scripted(lambda spec, index: [65] * 3)
    with serving(port, text, store=open_store(tmp_path)) as url:
        with httpx.stream("POST", f"{url}/v1/responses", json={**ASK, "stream": True}) as stream:
            line = next(line for line in stream.iter_lines() if line.startswith("data: "))
            id = json.loads(line[6:])["response"]["id"]
        assert wait_until(lambda: bool(port.cancelled()))
        assert wait_until(lambda: httpx.get(f"{url}/v1/responses/{id}").status_code == 200)
        assert httpx.get(f"{url}/v1/responses/{id}").json()["status"] == "cancelled"


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    from weft.errors import ConfigError

    store = open_store(tmp_path)
    with pytest.raises(ConfigError, match="another server keeps its data"):
        open_store(tmp_path)
    store.close()
    open_store(tmp_path).close()
    assert (tmp_path / "responses.sqlite").stat().st_mode & 0o777 == 0o600


def test_created_at_is_now(http: httpx.Client) -> None:
    made = http.post("/v1/responses", json=ASK).json()
    assert abs(made["created_at"] - time.time()) < 60
