"""Grammars of right calls, in every family's form: what they take and what they do not, behind thoughts and between texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from weft.conformance.tools import takes, weft
from weft.front.reasoning import MARKS
from weft.front.tools import PARSERS
from weft.front.tools.grammar import MOST_CALLS, answer, calls, closed, free, in_bare_text, within
from weft.front.tools.machine import Machine

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"type": "string", "enum": ["C", "F"]},
    },
    "required": ["city"],
}
TOOLS: dict[str, dict[str, Any]] = {"weather": WEATHER, "time": {"type": "object", "properties": {}}}
ONE = [("weather", {"city": 'Oslo "x"\n', "days": 3})]
TWO = [*ONE, ("time", {})]
WRONG = [
    ("weather", {"days": 3}),
    ("weather", {"city": "a", "days": "x"}),
    ("weather", {"city": "a", "more": 1}),
    ("tide", {}),
]
THINK = MARKS["think"]
EVERY = pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)
begin = weft()


def taken(source: str, text: str) -> bool:
    return takes(begin(source), text)


@EVERY
def test_forced_calls(parser: type[Machine]) -> None:
    write, several = parser.form.written, calls(parser.form, TOOLS, parallel=True)
    assert taken(several, write(ONE))
    assert taken(several, write(TWO)) == parser.form.several
    assert taken(several, write([("time", {})] * MOST_CALLS)) == parser.form.several
    for text in (
        *(write([wrong]) for wrong in WRONG),
        "",
        "Hi " + write(ONE),
        write(ONE)[:-1],
        write([("time", {})] * (MOST_CALLS + 1)),
    ):
        assert not taken(several, text)
    assert not taken(calls(parser.form, TOOLS, parallel=False), write(TWO))


@EVERY
def test_thoughts_before_forced_calls(parser: type[Machine]) -> None:
    said = parser.form.written(ONE)
    may = calls(parser.form, TOOLS, parallel=False, marks=THINK)
    must = calls(parser.form, TOOLS, parallel=False, marks=THINK, inside=True)
    assert taken(may, f"<think>\n{said}\n</think>\n\n{said}")
    assert taken(may, said)
    assert not taken(may, f"<think>\n{said}")
    assert taken(must, f"So.</think>{said}")
    assert not taken(must, said)


@EVERY
def test_free_answers_with_right_calls(parser: type[Machine]) -> None:
    """What strict functions ask for."""
    write, source = parser.form.written, free(parser, TOOLS, parallel=True)
    marked = parser.name not in ("json", "llama3_json")
    for text in ("Hello {", "", "No: <tool_cal", write(ONE), f"I look. {write(ONE)}" if marked else write(ONE)):
        assert taken(source, text), text
    assert taken(source, write(TWO)) == parser.form.several
    for text in (
        write([WRONG[0]]),
        write([WRONG[3]]),
        write(ONE)[:-1],
        parser.markers[0],
        f"{write(ONE)} {parser.markers[0]}x",
    ):
        assert not taken(source, text), text
    assert not taken(free(parser, TOOLS, parallel=False), write(TWO))
    assert taken(
        free(parser, TOOLS, parallel=True, marks=THINK, inside=True), f"{parser.markers[0]}</think>\n{write(ONE)}"
    )


@EVERY
def test_an_answer_in_json_beside_calls(parser: type[Machine]) -> None:
    source = answer({"enum": ["calm"]}, parser.form, TOOLS, parallel=True, marks=THINK)
    assert taken(source, '"calm"')
    assert taken(source, '<think>x</think>"calm"')
    assert taken(source, parser.form.written(ONE))
    assert not taken(source, '"wild"')
    alone = answer({"enum": ["calm"]}, parser.form, {}, parallel=True)
    assert taken(alone, '"calm"')
    assert not taken(alone, parser.form.written(ONE))


def test_what_bare_text_can_tell() -> None:
    def tells(schema: Any, **root: Any) -> bool:
        return in_bare_text({"type": "object", "properties": {"a": schema}, **root})

    assert all(
        map(tells, ({"type": "string"}, {"type": "integer", "minimum": 3}, {"type": "string", "enum": ["x y", ""]}))
    )
    assert not any(
        map(tells, ({}, {"type": ["string", "null"]}, {"type": "string", "pattern": "x"}, {"type": "string", "enum": ["<"]},
                    {"type": "array", "items": {"$ref": "#/x"}}, {"type": "boolean", "enum": ["yes"]}, True))
    )  # fmt: skip
    assert not tells({"type": "string"}, anyOf=[])
    assert not tells({"type": "string"}, required=["b"])
    form = PARSERS["qwen3_coder"].form
    for words, right in (
        ({"maxLength": 2}, form.written),
        ({"minLength": 1, "maxLength": 2}, replace(form, tag="").written),
    ):
        source = calls(form, {"f": {"properties": {"a": {"type": "string", **words}}}}, parallel=False)
        assert taken(source, right([("f", {"a": "xy"})]))
        assert not taken(source, right([("f", {"a": "xyz"})]))


def test_strings_end_within_the_room() -> None:
    """Those that no other word of their schema bounds, wherever they stand; the tools themselves are left as they were."""
    string, own, several = (
        {"type": "string"},
        {"type": "string", "pattern": "a"},
        {"type": "array", "items": {"type": "string"}},
    )
    schema = {"properties": {"a": string, "b": own, "c": several, "d": {"properties": {"e": string}}}}
    for room, chars, items in ((1, 16, 16), (100, 128, 16), (1000, 1024, 32), (30_000, 32_768, 1024)):
        made = within({"f": schema}, room)["f"]["properties"]
        bound = {"type": "string", "maxLength": chars}
        inner = {"type": "string", "maxLength": max(chars // items, 16)}
        assert made["c"] == {"type": "array", "items": inner, "maxItems": items}
        assert (made["a"], made["b"], made["d"]) == (bound, own, {"properties": {"e": bound}})
    assert (string, several) == ({"type": "string"}, {"type": "array", "items": {"type": "string"}})
    least = {"properties": {"a": {"type": "string", "minLength": 99}, "b": {"type": "array", "minItems": 99}}}
    made = within({"f": least}, 1)["f"]["properties"]
    assert (made["a"]["maxLength"], made["b"]["maxItems"]) == (99, 99)


def test_digits_of_numbers_end() -> None:
    """Where nothing else bounds them, or only one side does; a range beyond the bounds is left to itself."""
    properties = {
        "whole": {"type": "integer"},
        "any": {"type": "number", "description": "of anything"},
        "share": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        "huge": {"type": "number", "maximum": 1e20},
        "fine": {"type": "number", "multipleOf": 0.5},
    }
    made = within({"f": {"properties": properties}}, 100)["f"]["properties"]
    assert made["whole"] == {"type": "integer", "minimum": -(10**15), "maximum": 10**15}
    assert made["any"] == properties["any"] | {"minimum": -(10**15), "maximum": 10**15, "multipleOf": 1e-9}
    assert made["share"] == properties["share"] | {"multipleOf": 1e-9}
    assert (made["huge"], made["fine"]) == (properties["huge"], properties["fine"])
    form = PARSERS["hermes"].form
    right = form.written
    source = calls(
        form, within({"f": {"properties": {"x": {"type": "number"}}, "required": ["x"]}}, 100), parallel=False
    )
    for number in (0, -1, 12.5, 0.123456789, 999999999999999.5):
        assert taken(source, right([("f", {"x": number})])), number
    for number in ("1" * 40, "0." + "3" * 40, "1." + "0" * 40):
        assert not taken(source, right([("f", {"x": 7})]).replace("7", number)), number


def test_closing_a_schema_takes_nothing_away_that_it_names() -> None:
    inner = {"type": "object", "properties": {"b": {"type": "array", "items": {"type": "object", "properties": {}}}}}
    made = closed({"properties": {"a": inner}})
    assert made["additionalProperties"] is False
    assert made["properties"]["a"]["additionalProperties"] is False
    assert made["properties"]["a"]["properties"]["b"]["items"]["additionalProperties"] is False
    for open_ in (
        {"properties": {}, "additionalProperties": True},
        {"properties": {}, "anyOf": []},
        {"type": "object"},
    ):
        assert closed(open_).get("additionalProperties") is not False
    assert "additionalProperties" not in closed({"properties": {}, "required": ["a"]})
    assert "additionalProperties" not in inner, "the schema itself is left as it was"
