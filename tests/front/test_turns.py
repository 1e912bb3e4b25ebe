"""Thoughts, tool calls and structured output in responses and in Anthropic's messages."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.front import calls as forms
from tests.front.conftest import MODEL, serving
from tests.front.scripted import ScriptedPort
from tests.front.test_responses import events_of
from weft.front.port import EngineInfo
from weft.front.text import ModelText
from weft.types import Add, TokenItem

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
PARIS = ("weather", {"city": "Paris", "days": 3})
TWO = [PARIS, ("time", {})]
CALLS = forms.FORMS["json"][0](TWO)
MARKED = forms.FORMS["hermes"][0](TWO)
THOUGHT = "<think>Where is it?</think>"
FUNCTIONS: list[Any] = [
    {"type": "function", "name": "weather", "description": "The weather.", "parameters": SCHEMA, "strict": True},
    {"type": "function", "name": "time", "parameters": {"type": "object", "properties": {}}, "strict": False},
]
TOOLS: list[Any] = [
    {"name": "weather", "description": "The weather.", "input_schema": SCHEMA},
    {"name": "time", "input_schema": {"type": "object", "properties": {}}},
]
ASK: dict[str, Any] = {"model": MODEL, "input": "What is the weather?", "tools": FUNCTIONS}
TELL: dict[str, Any] = {
    "model": MODEL, "max_tokens": 400, "messages": [{"role": "user", "content": "What is the weather?"}], "tools": TOOLS,
}  # fmt: skip


class Says:
    """A server whose model says one text, to whatever it is asked."""

    def __init__(self, port: ScriptedPort, url: str, text: ModelText) -> None:
        self.port, self.url, self._text = port, url, text

    def post(self, path: str, body: dict[str, Any], **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{path}", json={**body, **more}, timeout=30)

    def prompt(self) -> str:
        """What it was asked last."""
        spec = [c.spec for c in self.port.commands if isinstance(c, Add)][-1]
        ids = [i for item in spec.items if isinstance(item, TokenItem) for i in item.ids]
        return self._text.tokenizer.decode(ids, skip_special=False)


@pytest.fixture
def saying(info: EngineInfo, text: ModelText) -> Iterator[Callable[..., Says]]:
    with contextlib.ExitStack() as stack:

        def make(says: str, **options: Any) -> Says:
            ids = [*text.tokenizer.encode(says, add_special=False), text.eos_ids[0]]
            port = ScriptedPort(lambda spec, index: ids, replace(info, max_model_len=4096))
            stack.callback(port.close)
            return Says(port, stack.enter_context(serving(port, text, **options)), text)

        yield make


def test_calls_in_responses(saying: Callable[..., Says]) -> None:
    model = saying(CALLS)
    with openai.OpenAI(base_url=f"{model.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.responses.create(**ASK)
        calls: list[Any] = [item for item in answer.output if item.type == "function_call"]
        assert [(call.name, json.loads(call.arguments)) for call in calls] == TWO
        assert [item.type for item in answer.output] == ["function_call"] * 2
        assert answer.status == "completed"
        with client.responses.stream(**ASK) as stream:
            kinds = [event.type for event in stream]
            final: list[Any] = list(stream.get_final_response().output)
    assert [(call.name, json.loads(call.arguments)) for call in final] == TWO
    assert len({call.call_id for call in (*calls, *final)}) == 4
    one = ["response.output_item.added", "delta", "response.function_call_arguments.done", "response.output_item.done"]
    told = [kind for i, kind in enumerate(kinds) if not (kind.endswith("delta") and kinds[i - 1] == kind)]
    assert [("delta" if kind.endswith("delta") else kind) for kind in told][2:-1] == one * 2


def test_events_of_calls_have_their_places(saying: Callable[..., Says]) -> None:
    events = events_of(saying(f"Let me see. {MARKED}", tool_parser="hermes").post("responses", ASK, stream=True))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    items = events[-1]["response"]["output"]
    assert [item["type"] for item in items] == ["message", "function_call", "function_call"]
    for index, item in enumerate(items):
        mine = [event for event in events if event.get("output_index") == index]
        assert mine[0]["type"] == "response.output_item.added"
        assert mine[0]["item"]["status"] == "in_progress"
        assert (mine[-1]["type"], mine[-1]["item"]) == ("response.output_item.done", item)
        pieces = "".join(event["delta"] for event in mine if event["type"].endswith("delta"))
        assert pieces == (item["arguments"] if index else item["content"][0]["text"])


def test_a_conversation_with_results(saying: Callable[..., Says]) -> None:
    """What was called and what came of it reach the template, by items and by a turn with blocks alike."""
    model = saying("It is warm.")
    history: list[Any] = [
        {"role": "user", "content": "What is the weather?"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Paris"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "21 degrees"},
    ]
    assert model.post("responses", ASK, input=history).status_code == 200
    by_items = model.prompt()
    turns: list[Any] = [
        *TELL["messages"],
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Paris"}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "21 degrees"}]},
    ]
    assert model.post("messages", TELL, messages=turns).status_code == 200
    assert "21 degrees" in by_items
    assert '"Paris"' in by_items
    assert "21 degrees" in model.prompt()
    assert '"Paris"' in model.prompt()


def test_calls_in_messages(saying: Callable[..., Says]) -> None:
    model = saying(f"Let me see. {MARKED}", tool_parser="hermes")
    with anthropic.Anthropic(base_url=model.url, api_key="none", max_retries=0) as client:
        answer = client.messages.create(**TELL)
        with client.messages.stream(**TELL) as stream:
            final = stream.get_final_message()
    for message in (answer, final):
        assert [block.type for block in message.content] == ["text", "tool_use", "tool_use"]
        assert [(block.name, block.input) for block in message.content[1:]] == TWO  # type: ignore[union-attr]
        assert message.content[0].text.strip() == "Let me see."  # type: ignore[union-attr]
        assert message.stop_reason == "tool_use"
    events = events_of(model.post("messages", TELL, stream=True))
    for index in range(3):
        mine = [event["type"] for event in events if event.get("index") == index]
        assert mine[0] == "content_block_start"
        assert mine[-1] == "content_block_stop"
        assert set(mine[1:-1]) <= {"content_block_delta"}


def test_thoughts(saying: Callable[..., Says]) -> None:
    model = saying(f"{THOUGHT}It is warm.", reasoning_parser="think")
    plain = {key: value for key, value in ASK.items() if key != "tools"}
    answer = model.post("responses", plain).json()
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message"]
    assert answer["output"][0]["content"] == [{"type": "reasoning_text", "text": "Where is it?"}]
    assert answer["output"][1]["content"][0]["text"].strip() == "It is warm."
    assert 0 < answer["usage"]["output_tokens_details"]["reasoning_tokens"] < answer["usage"]["output_tokens"]
    kinds = [event["type"] for event in events_of(model.post("responses", plain, stream=True))]
    assert kinds.index("response.reasoning_text.done") < kinds.index("response.output_text.delta")
    said = model.post("messages", TELL, tools=None).json()
    assert [block["type"] for block in said["content"]] == ["thinking", "text"]
    assert said["content"][0]["thinking"] == "Where is it?"
    events = events_of(model.post("messages", TELL, tools=None, stream=True))
    assert (
        "".join(e["delta"].get("thinking", "") for e in events if e["type"] == "content_block_delta") == "Where is it?"
    )


def test_a_call_that_is_cut_and_one_that_is_none(saying: Callable[..., Says]) -> None:
    cut = saying(CALLS).post("responses", ASK, max_output_tokens=12).json()
    assert cut["status"] == "incomplete"
    assert all(item["status"] == "incomplete" for item in cut["output"])
    none = saying('{"name": "weather", "arguments": {"city": oh no').post("responses", ASK).json()
    assert [item["type"] for item in none["output"]] == ["message"]
    assert "oh no" in none["output"][0]["content"][0]["text"]
    said = saying('{"name": "weather", "arguments": {"city": oh no').post("messages", TELL).json()
    assert [block["type"] for block in said["content"]] == ["text"]
    assert said["stop_reason"] == "end_turn"


@pytest.mark.parametrize(
    ("path", "body", "change", "said"),
    [
        ("responses", ASK, {"tools": [{"type": "web_search"}]}, "tools of its own"),
        ("responses", ASK, {"tools": [{"type": "function"}]}, "name"),
        ("responses", ASK, {"tool_choice": {"type": "function", "name": "no"}}, "none of the tools"),
        ("responses", ASK, {"tool_choice": "sometimes"}, "tool_choice"),
        ("responses", ASK, {"text": {"format": {"type": "json_schema", "name": "x"}}}, "schema"),
        ("responses", ASK, {"text": {"shape": 1}}, "text"),
        ("messages", TELL, {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools of its own"),
        ("messages", TELL, {"tools": [{"input_schema": {}}]}, "name"),
        ("messages", TELL, {"tool_choice": {"type": "tool", "name": "no"}}, "none of the tools"),
        ("messages", TELL, {"tool_choice": {"type": "sometimes"}}, "tool_choice"),
        ("messages", TELL, {"output_config": {"effort": "high"}}, "output_config"),
        ("messages", TELL, {"output_config": {"format": {"type": "xml"}}}, "output_config"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(url: str, path: str, body: dict[str, Any], change: dict[str, Any], said: str) -> None:
    answer = httpx.post(f"{url}/v1/{path}", json={**body, **change})
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]


def test_required_calls_and_json_on_the_bundled_model(url: str) -> None:
    """Whatever the model would say: a call with right arguments, an object of the schema."""
    ask = {**ASK, "tool_choice": {"type": "function", "name": "weather"}, "max_output_tokens": 300, "seed": 3}
    (call,) = httpx.post(f"{url}/v1/responses", json=ask, timeout=60).json()["output"]
    assert (call["type"], call["name"]) == ("function_call", "weather")
    assert isinstance(json.loads(call["arguments"])["city"], str)
    tell = {**TELL, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "seed": 3}
    said = httpx.post(f"{url}/v1/messages", json=tell, timeout=60).json()
    (block,) = said["content"]
    assert (block["type"], said["stop_reason"]) == ("tool_use", "tool_use")
    small = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "name": "x", "schema": small}}
    answer = httpx.post(
        f"{url}/v1/responses", json={"model": MODEL, "input": "Is it?", "text": form}, timeout=60
    ).json()
    assert set(json.loads(answer["output"][0]["content"][0]["text"])) == {"ok"}
    body = {**TELL, "tools": None, "output_config": {"format": {"type": "json_schema", "schema": small}}}
    said = httpx.post(f"{url}/v1/messages", json=body, timeout=60).json()
    assert set(json.loads(said["content"][0]["text"])) == {"ok"}
