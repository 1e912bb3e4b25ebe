"""`tool_choice` required and named, over HTTP, on the bundled model: a call with valid arguments every time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from tests.front.conftest import MODEL
from weft.conformance.tools import samples
from weft.front.tools.grammar import MOST_CALLS

ASK: list[Any] = [{"role": "user", "content": "Tell me about the sea, and call what you can."}]
SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
    },
    "set_alarm": {
        "type": "object",
        "properties": {
            "time": {"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$"},
            "on": {"type": "boolean"},
            "days": {"type": "array", "items": {"enum": ["mon", "tue"]}, "minItems": 1, "maxItems": 2},
            "who": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]},
        },
        "required": ["time", "on", "days", "who"],
        "additionalProperties": False,
    },
    "stop": {"type": "object", "properties": {}},
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": "Does it.", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": ASK, "tools": TOOLS, **options})


def check(choice: Any, schemas: dict[str, Any]) -> list[str]:
    """Names of the calls of a choice, which are right."""
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    for call in choice.message.tool_calls:
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
    return [call.function.name for call in choice.message.tool_calls]


def test_required_calls_every_time(client: openai.OpenAI) -> None:
    called = set()
    for temperature in (0.0, 0.7, 1.5):
        options: dict[str, Any] = {"n": 4 if temperature else 1, "seed": 5, "temperature": temperature}
        for choice in ask(client, tool_choice="required", parallel_tool_calls=False, **options).choices:
            (name,) = check(choice, SCHEMAS)
            called.add(name)
    assert len(called) > 1


def test_several_calls(client: openai.OpenAI) -> None:
    short = {"type": "object", "properties": {"to": {"enum": ["a", "b"]}}, "required": ["to"]}
    tool = {"type": "function", "function": {"name": "go", "parameters": short}}
    answer = ask(client, tools=[tool], tool_choice="required", n=2, seed=3)
    counts = [len(check(choice, {"go": short})) for choice in answer.choices]
    assert 1 < max(counts) <= MOST_CALLS
    with ask(client, tools=[tool], tool_choice="required", n=2, seed=3, stream=True) as stream:
        names = [c.function.name for chunk in stream for x in chunk.choices for c in x.delta.tool_calls or ()]
    assert len(list(filter(None, names))) == sum(counts)


def test_a_named_function_is_called_once(client: openai.OpenAI) -> None:
    for name in SCHEMAS:
        choice: Any = {"type": "function", "function": {"name": name}}
        for one in ask(client, tool_choice=choice, n=4, seed=1).choices:
            assert check(one, SCHEMAS) == [name]


def test_tools_of_others(client: openai.OpenAI, shared: Callable[[str], Path]) -> None:
    """One right call of each of some tools of the leaderboard, drawn with as many seeds."""
    small = [s for s in samples(shared("data/tools").parent) if s.calls and len(json.dumps(s.tools)) < 500]
    found = small[::50]
    assert len(found) > 6
    for i, sample in enumerate(found):
        tool = sample.tools[0]
        (choice,) = ask(client, tools=[tool], tool_choice="required", seed=i, parallel_tool_calls=False).choices
        check(choice, {tool["function"]["name"]: tool["function"]["parameters"]})


def test_a_schema_that_is_none_is_refused(client: openai.OpenAI) -> None:
    """And the server goes on; without having to call, the schema is only told of."""
    for bad in ({"a": {"type": "dict"}}, {"a": {"type": "string", "pattern": "("}}, {"a": {"$ref": "#/nowhere"}}):
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": bad}}}
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, tools=[tool], tool_choice="required")
        assert error.value.param == "tools"
        assert error.value.code == "invalid_grammar"
        assert ask(client, tools=[tool], max_tokens=2).choices[0].finish_reason == "length"


def test_an_answer_in_json_or_a_call(client: openai.OpenAI) -> None:
    """With tools that may be called, an answer that is no call is what response_format says."""
    asked: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["calm", "wild"]}}}
    tool = {"type": "function", "function": {"name": "go", "parameters": {"type": "object", "properties": {}}}}
    seen = set()
    for choice in ask(client, tools=[tool], response_format=asked, n=8, seed=2, temperature=1.5).choices:
        if choice.finish_reason == "tool_calls":
            check(choice, {"go": {}})
        else:
            assert json.loads(choice.message.content) in ("calm", "wild")
        seen.add(choice.finish_reason)
    assert "stop" in seen


def test_a_strict_function_is_called_rightly_or_not_at_all(client: openai.OpenAI) -> None:
    strict = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    answer = ask(
        client, tools=strict, n=6, seed=4, temperature=1.2, max_tokens=40, extra_body={"weft": {"label": True}}
    )
    assert "constrain=llguidance" in answer.weft["stack"]
    for choice in answer.choices:
        assert choice.message.tool_calls or not (choice.message.content or "").lstrip().startswith("{")


def test_the_label_names_what_holds_the_answer(client: openai.OpenAI) -> None:
    answer = ask(
        client, tool_choice="required", parallel_tool_calls=False, seed=1, extra_body={"weft": {"label": True}}
    )
    assert "constrain=llguidance" in answer.weft["stack"]
