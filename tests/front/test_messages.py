"""/v1/messages: Anthropic's client on the real server, the order of events, and errors in its form."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.front.conftest import CONTEXT, MODEL, serving
from tests.front.scripted import ScriptedPort
from tests.front.test_responses import events_of
from weft.front.admission import Bounds
from weft.front.text import ModelText

ASK: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}], "seed": 1}


@pytest.fixture(scope="module")
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_an_answer_is_that_of_chat(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    said = claude.messages.create(
        model=MODEL, max_tokens=8, extra_body={"temperature": 0}, system=[{"type": "text", "text": "Be kind."}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
    )  # fmt: skip
    chat = client.chat.completions.create(
        model=MODEL, max_tokens=8, temperature=0,
        messages=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}],
    )  # fmt: skip
    (block,) = said.content
    assert block.type == "text"
    assert block.text == chat.choices[0].message.content != ""
    assert said.stop_reason == "max_tokens"
    assert chat.usage is not None
    assert said.usage.input_tokens + (said.usage.cache_read_input_tokens or 0) == chat.usage.prompt_tokens
    assert said.usage.output_tokens == 8
    counted = claude.messages.count_tokens(
        model=MODEL, system="Be kind.", messages=[{"role": "user", "content": "Hello"}]
    )
    assert counted.input_tokens == chat.usage.prompt_tokens


def test_events_have_anthropics_names_and_order(http: httpx.Client) -> None:
    whole = http.post("/v1/messages", json=ASK).json()
    events = events_of(http.post("/v1/messages", json={**ASK, "stream": True}))
    kinds = [event["type"] for event in events]
    deltas = [event for event in events if event["type"] == "content_block_delta"]
    assert kinds == [
        "message_start", "content_block_start", "ping", *["content_block_delta"] * len(deltas), "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert len(deltas) > 2
    assert "".join(event["delta"]["text"] for event in deltas) == whole["content"][0]["text"]
    start = events[0]["message"]
    assert (start["role"], start["content"], start["stop_reason"]) == ("assistant", [], None)
    assert events[-2]["delta"] == {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 8


def test_the_official_client_streams(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model=MODEL, max_tokens=6, messages=[{"role": "user", "content": "Hello"}]) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.content[0].text == text  # type: ignore[union-attr]
    assert final.usage.output_tokens == 6


def test_reasons_to_stop(http: httpx.Client) -> None:
    stopped = http.post("/v1/messages", json={**ASK, "max_tokens": 50, "stop_sequences": [" "]}).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", " ")
    assert " " not in stopped["content"][0]["text"]
    long = {**ASK, "max_tokens": 10 * CONTEXT, "messages": [{"role": "user", "content": "word " * 990}]}
    assert http.post("/v1/messages", json=long).json()["stop_reason"] in ("model_context_window_exceeded", "end_turn")


def test_an_answer_that_is_begun_is_gone_on_with(http: httpx.Client) -> None:
    begun = [*ASK["messages"], {"role": "assistant", "content": "Once upon a"}]
    greedy = {**ASK, "temperature": 0}
    said = http.post("/v1/messages", json={**greedy, "messages": begun}).json()["content"][0]["text"]
    chat = http.post(
        "/v1/chat/completions", json={**greedy, "messages": begun, "continue_final_message": True}
    ).json()  # fmt: skip
    assert said == chat["choices"][0]["message"]["content"]


def test_tools_of_an_earlier_turn_reach_the_template() -> None:
    from weft.front.anthropic.structs import CountRequest, Message

    use = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 2}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "4"}]}
    turns = [
        Message("user", "What is 2+2?"),
        Message("assistant", [{"type": "text", "text": "I add."}, use]),
        Message("user", [result, {"type": "text", "text": "So?"}]),
    ]
    chat = CountRequest(messages=turns).as_chat()
    assert chat.messages is not None
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "user"]
    assert chat.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a":2}'}
    assert chat.messages[2] == {"role": "tool", "tool_call_id": "t1", "content": "4"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"messages": []}, "messages is missing"),
        ({"messages": [{"role": "system", "content": "x"}]}, "use user or assistant"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}
                ]
            },
            "image",
        ),
        ({"mcp_servers": [{"type": "url", "url": "http://x", "name": "y"}]}, "mcp_servers"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"temperature": -1}, "temperature"),
        ({"tool_choice": {"type": ["any"]}}, "tool_choice.type"),
        ({"tool_choice": {"type": {}}}, "tool_choice.type"),
        ({"max_tokens": "x"}, "max_tokens"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_its_form(http: httpx.Client, change: dict[str, Any], said: str) -> None:
    answer = http.post("/v1/messages", json={**ASK, **change})
    assert answer.status_code == 400
    told = answer.json()
    assert told["type"] == "error"
    assert told["error"]["type"] == "invalid_request_error"
    assert said in told["error"]["message"]
    assert answer.headers["request-id"] == told["request_id"]


def test_errors_of_the_official_client(
    url: str, claude: anthropic.Anthropic, text: ModelText, scripted: Callable[..., ScriptedPort]
) -> None:
    hello: Any = {"max_tokens": 3, "messages": [{"role": "user", "content": "Hello"}]}
    with pytest.raises(anthropic.NotFoundError, match="does not exist here"):
        claude.messages.create(model="no-such-model", **hello)
    port = scripted(lambda spec, index: [65] * spec.sampling.max_tokens)
    with serving(port, text, api_key="sesame") as keyed:
        with anthropic.Anthropic(base_url=keyed, api_key="wrong", max_retries=0) as stranger:
            with pytest.raises(anthropic.AuthenticationError):
                stranger.messages.create(model=MODEL, **hello)
        with anthropic.Anthropic(base_url=keyed, api_key="sesame", max_retries=0) as friend:
            assert friend.messages.create(model=MODEL, **hello).content
            port.give_up = "it cannot go on"
            with pytest.raises(anthropic.InternalServerError, match="it cannot go on"):
                friend.messages.create(model=MODEL, **hello)
            port.die("the engine is gone")
            with pytest.raises(anthropic.APIStatusError) as dead:
                friend.messages.create(model=MODEL, **hello)
            assert dead.value.status_code == 529
        assert httpx.get(f"{keyed}/v1/messages", headers={"x-api-key": "sesame"}).json()["type"] == "error"


def test_who_has_asked_too_much_is_told_when_to_ask_again(
    text: ModelText, scripted: Callable[..., ScriptedPort]
) -> None:
    port = scripted(lambda spec, index: [65] * spec.sampling.max_tokens)
    hello: Any = {"model": MODEL, "max_tokens": 3, "messages": [{"role": "user", "content": "Hello"}]}
    with (
        serving(port, text, bounds=Bounds(requests_per_minute=1)) as url,
        anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as claude,
    ):
        claude.messages.create(**hello)
        with pytest.raises(anthropic.RateLimitError) as refused:
            claude.messages.create(**hello)
        assert 50 <= int(refused.value.response.headers["retry-after"]) <= 60


def test_a_failure_in_mid_stream_is_an_event(text: ModelText, scripted: Callable[..., ScriptedPort]) -> None:
    port = scripted(lambda spec, index: [65] * 3)
    with serving(port, text) as url, httpx.stream("POST", f"{url}/v1/messages", json={**ASK, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(line for line in lines if "content_block_delta" in line)
        port.die("the engine is gone")
        rest = list(lines)
    at = rest.index("event: error")
    assert json.loads(rest[at + 1].removeprefix("data: "))["error"]["type"] == "overloaded_error"
    assert "message_stop" not in "".join(rest)
