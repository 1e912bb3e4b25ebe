"""The suite `tools`: right counts over samples of others, and broken parsers and grammars that it finds out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from weft.conformance.tools import Sample, fits, judge, made_wrong, ordered, samples, weft
from weft.front.openai.offer import offer_of
from weft.front.openai.structs import ChatRequest
from weft.front.tools import PARSERS
from weft.front.tools.form import Form
from weft.front.tools.hermes import Hermes
from weft.front.tools.machine import Machine

Shared = Callable[[str], Path]
STEP = 40


@pytest.fixture(scope="module")
def found(shared: Shared) -> list[Sample]:
    return list(samples(shared("data/tools").parent))


def test_some_samples_in_every_form(found: list[Sample]) -> None:
    count = judge(found[::STEP], weft())
    assert (count.total, count.enforced, count.wrong) == (len(found[::STEP]), len(found[::STEP]), [])
    assert count.ok


@pytest.mark.long
def test_all_samples_in_every_form(found: list[Sample]) -> None:
    count = judge(found, weft())
    assert count.wrong == []
    assert (count.total, count.refused) == (1895, 2)


class Hasty(Hermes):
    """Ends a call at the first closing tag, as parsers that look for tags do."""

    def feed(self, text: str) -> list[Any]:
        return super().feed(text.replace("</tool_call>", "\x01", 1))


class Trusting(Hermes):
    """Takes any name."""

    def known(self, name: str) -> bool:
        return True


class Torn(Machine):
    """Reads what it is given at once, and loses the rest."""

    name = "torn"
    form = Hermes.form
    markers = Hermes.markers
    calls = Hermes.calls

    def feed(self, text: str) -> list[Any]:
        return [] if len(text) < 2 else super().feed(text)


AWKWARD = Sample(
    "awkward",
    [{"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}}}],
    [("f", {"a": "x </tool_call> y"})],
)  # fmt: skip


@pytest.mark.parametrize(("parser", "accept", "reject"), [(Hasty, 0, 2), (Trusting, 1, 0), (Torn, 0, 1)])
def test_broken_parsers_are_found_out(parser: type[Machine], accept: int, reject: int) -> None:
    assert judge([AWKWARD], weft(), [Hermes]).enforced == 1
    count = judge([AWKWARD], weft(), [parser])
    assert (count.enforced, count.wrong_accept > 0, count.wrong_reject > 0) == (0, accept > 0, reject > 0)


def test_broken_grammars_are_found_out() -> None:
    begin = weft()
    loose = judge([AWKWARD], lambda source: begin("start: /(?s:.*)/"), [Hermes])
    assert (loose.enforced, loose.wrong_accept, loose.wrong_reject) == (0, 3, 0)
    tight = judge([AWKWARD], lambda source: begin('start: "no"'), [Hermes])
    assert (tight.enforced, tight.wrong_accept, tight.wrong_reject) == (0, 0, 1)
    odd = Form(call='<tool_call>{"name": "NAME", "arguments": ARGUMENTS }</tool_call>')
    assert judge([AWKWARD], lambda source: begin(source.replace("</tool_call>", "</call>")), [Hermes]).wrong_reject == 1
    assert odd.written([("f", {})]) == '<tool_call>{"name": "f", "arguments": {} }</tool_call>'


def test_what_fits_is_what_a_validator_takes(found: list[Sample]) -> None:
    """By the package jsonschema, where members that a schema does not name are forbidden."""

    def closed(schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        out = {key: closed(value) if key == "items" else value for key, value in schema.items()}
        if "properties" in schema:
            out["properties"] = {key: closed(value) for key, value in schema["properties"].items()}
            out["additionalProperties"] = False
        return out

    def pairs() -> Iterator[tuple[Any, Any]]:
        for sample in found[:: STEP // 10]:
            tools = offer_of(ChatRequest(tools=sample.tools)).functions
            for name, given in sample.calls:
                yield tools[name], ordered(tools[name], given)
                yield from ((tools[n], g) for n, g in made_wrong(tools[name], (name, given)) if n in tools)

    seen = {True: 0, False: 0}
    for schema, value in pairs():
        right = jsonschema.Draft202012Validator(closed(schema)).is_valid(value)
        assert fits(schema, value) == right
        seen[right] += 1
    assert min(seen.values()) > 300


def test_every_family_has_a_form() -> None:
    for name, parser in PARSERS.items():
        assert (parser.name, parser.form.several) == (name, name != "llama3_json")
