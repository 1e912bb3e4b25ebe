"""Structured output over HTTP on the bundled model: every answer that ends is what was asked for, however it was asked."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from tests.front.conftest import MODEL, metric
from weft import SamplingParams
from weft.errors import RequestError

SCHEMAS: dict[str, dict[str, Any]] = {
    "call": {
        "type": "object",
        "properties": {
            "function": {"enum": ["get_weather", "get_time"]},
            "arguments": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 14},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
        "required": ["function", "arguments"],
        "additionalProperties": False,
    },
    "event": {
        "type": "object",
        "properties": {
            "when": {"type": "string", "format": "date-time"},
            "mail": {"type": "string", "format": "email", "maxLength": 24},
            "id": {"type": "string", "format": "uuid"},
        },
        "required": ["when", "id"],
        "additionalProperties": False,
    },
    "tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "number", "minimum": 0, "maximum": 9},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "list": {
        "type": "array",
        "items": {
            "type": "array",
            "prefixItems": [{"enum": ["a", "b"]}, {"type": "boolean"}],
            "minItems": 2,
            "maxItems": 2,
        },
        "minItems": 1,
        "maxItems": 4,
    },
    "either": {
        "anyOf": [
            {"const": {"ok": True}},
            {
                "type": "object",
                "properties": {"error": {"type": "string", "maxLength": 8}},
                "required": ["error"],
                "additionalProperties": False,
            },
        ]
    },
}
ASK = [{"role": "user", "content": "Answer in JSON."}]


def fits(text: str, schema: dict[str, Any]) -> Any:
    value = json.loads(text)
    jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())
    return value


def format_of(schema: dict[str, Any]) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_is_of_its_schema(client: openai.OpenAI, name: str) -> None:
    """Greedy and drawn, chat and completions, with a draft and without: and with it the same."""
    schema = SCHEMAS[name]
    for temperature, seed in ((0.0, 1), (1.2, 2)):
        asked: dict[str, Any] = {
            "model": MODEL,
            "max_tokens": 400,
            "temperature": temperature,
            "seed": seed,
            "response_format": format_of(schema),
        }
        texts = []
        for own in ({}, {"weft": {"with": ["draft=ngram"], "label": True}}):
            answer = client.chat.completions.create(messages=ASK, extra_body=own, **asked)
            choice = answer.choices[0]
            assert choice.finish_reason == "stop", choice
            fits(choice.message.content or "", schema)
            texts.append(choice.message.content)
            if own:
                assert any(part.startswith("constrain=llguidance") for part in answer.model_extra["weft"]["stack"])  # type: ignore[index]
        assert texts[0] == texts[1]
    raw = client.completions.create(
        model=MODEL, prompt="It was", max_tokens=400, seed=4, n=2, extra_body={"structured_outputs": {"json": schema}}
    )
    assert [fits(c.text, schema) for c in raw.choices if c.finish_reason == "stop"]


def test_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": ASK,
        "max_tokens": 300,
        "seed": 5,
        "response_format": format_of(SCHEMAS["call"]),
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [
        c.choices[0].delta.content or "" for c in client.chat.completions.create(stream=True, **asked) if c.choices
    ]
    assert "".join(pieces) == whole
    assert len([p for p in pieces if p]) > 3
    fits(whole or "", SCHEMAS["call"])


def test_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=60, seed=1, stop=["}"], response_format={"type": "json_object"},
        extra_body={"include_stop_str_in_output": True},
    )  # fmt: skip
    text = answer.choices[0].message.content or ""
    assert text.startswith("{")
    if "{" not in text[1:] and answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
    asked: dict[str, Any] = {"model": MODEL, "messages": ASK, "max_tokens": 8, "seed": 1}
    free = client.chat.completions.create(**asked).choices[0].message.content
    assert free == client.chat.completions.create(**asked, response_format={"type": "text"}).choices[0].message.content


@pytest.mark.parametrize(
    ("structured", "pattern"),
    [
        ({"regex": "[0-9]{3}-[0-9]{4}"}, "[0-9]{3}-[0-9]{4}"),
        ({"choice": ["north", "south", "a \"quoted\" one"]}, "north|south|a \"quoted\" one"),
        ({"grammar": 'start: "move" (" " DIRECTION){1,3}\nDIRECTION: /left|right/'}, "move( (left|right)){1,3}"),
        ({"grammar": 'root ::= "move" (" " ("left" | "right")){1,3}'}, "move( (left|right)){1,3}"),
    ],
    ids=str,
)  # fmt: skip
def test_other_grammars(http: httpx.Client, structured: dict[str, Any], pattern: str) -> None:
    for temperature in (0.0, 1.0):
        body = {
            "prompt": "Go",
            "max_tokens": 60,
            "temperature": temperature,
            "seed": 3,
            "n": 2,
            "structured_outputs": structured,
        }
        choices = http.post("/v1/completions", json=body).json()["choices"]
        for choice in choices:
            assert choice["finish_reason"] == "stop"
            assert re.fullmatch(pattern, choice["text"]), choice


def test_many_at_once(http: httpx.Client) -> None:
    """32 with five schemas, and eight without: all fit, the same as alone, and the cost is told."""
    before = metric(http, "weft:grammar_rows_total"), metric(http, "weft:grammars_total")
    names = list(SCHEMAS)

    def ask(i: int) -> str:
        body: dict[str, Any] = {"messages": ASK, "max_tokens": 400, "seed": i, "temperature": 0.8}
        if i < 32:
            body["response_format"] = format_of(SCHEMAS[names[i % 5]])
        else:
            body["max_tokens"] = 12
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        if i < 32 and choice["finish_reason"] == "stop":
            fits(choice["message"]["content"], SCHEMAS[names[i % 5]])
        return str(choice["message"]["content"])

    with ThreadPoolExecutor(40) as threads:
        together = list(threads.map(ask, range(40)))
    assert [ask(i) for i in (0, 1, 35)] == [together[i] for i in (0, 1, 35)]
    assert metric(http, "weft:grammar_rows_total") - before[0] > 32 * 5
    assert metric(http, "weft:grammars_total") - before[1] == 34
    assert metric(http, "weft:grammar_mask_seconds_total") > 0
    assert metric(http, "weft:grammar_steps_total") > 0


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": format_of({"type": "array", "uniqueItems": True})}, "response_format", "uniqueItems"),
    ({"response_format": format_of({"not": {}})}, "response_format", "not"),
    ({"response_format": format_of({"type": "string", "format": "hostname"})}, "response_format", "hostname"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs", "JSON schema"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed group"),
    ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs", "unknown name"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs", "list of texts"),
    ({"structured_outputs": {}}, "structured_outputs", "one of"),
    ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs", "regex and grammar"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs", "whitespace_pattern"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs", "both"),
    ({"guided_json": {}}, "guided_json", "structured_outputs"),
]


@pytest.mark.parametrize(("fields", "param", "says"), REFUSED, ids=lambda x: str(x)[:50])
def test_refused_by_name(http: httpx.Client, fields: dict[str, Any], param: str, says: str) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 4, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert says in error["message"]


def test_a_grammar_that_cannot_go_on_in_a_step_is_refused_too(http: httpx.Client) -> None:
    """The library finds only behind the first token that this one is too large.  The request is at fault, and not the server,
    whose 500 clients would ask again for."""
    huge = {"structured_outputs": {"regex": "a{99999999}"}, "max_tokens": 4}
    asked: dict[str, dict[str, object]] = {"chat/completions": {"messages": ASK}, "completions": {"prompt": "a"}}
    for path, what in asked.items():
        answer = http.post(f"/v1/{path}", json={**huge, **what})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_grammar", "structured_outputs")
        assert "too complex" in error["message"]
    streamed = http.post("/v1/chat/completions", json={**huge, "messages": ASK, "stream": True})
    assert '"type":"invalid_request_error"' in streamed.text, (
        "as an answer or as an event, by whether a token was told before"
    )
    assert metric(http, "weft:requests_running") == 0


def test_the_same_names_in_python() -> None:
    for wrong in (
        {"regexp": "a"},
        {"regex": "a", "choice": ["a"]},
        {},
        {"regex": ""},
        {"choice": "a"},
        {"json_object": 1},
        {"json": {1, 2}},
        ["json"],
    ):
        with pytest.raises(RequestError) as caught:
            SamplingParams(structured_outputs=wrong)  # type: ignore[arg-type]
        assert caught.value.param == "structured_outputs"
    with pytest.raises(RequestError, match="at most"):
        SamplingParams(structured_outputs={"regex": "a" * (1 << 21)})
    assert (
        SamplingParams(structured_outputs={"json": {"type": "null"}}).grammar
        == SamplingParams(structured_outputs={"json": '{"type": "null"}'}).grammar
    )
    assert SamplingParams(structured_outputs={"json_object": True, "regex": None, "choice": None}).grammar is not None
