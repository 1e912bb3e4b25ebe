"""Row 6: a megabyte of output that is meant to hurt costs a parser of tool calls, or of thoughts, linear time."""

from __future__ import annotations

import time

import pytest

from tests.front.calls import parser
from weft.front.tools import PARSERS

SIZE, MEGABYTE = 1 << 17, 1 << 20
UNITS = {
    "pythonic": "[f(a=",
    "nested pythonic": "[f(a=[b(c=",
    "brackets": "[[",
    "braces": '{"a":',
    "open strings": '{"name": "',
    "escapes": '{"name": "\\\\\\"',
    "openings": "<tool_call>",
    "half openings": "<tool_cal",
    "openings with a call": '<tool_call>{"name": "f", "arguments": {',
    "functions": "<function=f><parameter=a>",
    "closings": "</tool_call></function></parameter>",
    "lists": "[TOOL_CALLS][",
    "tags": "<|python_tag|>{",
    "fences": "```json\n{",
    "spaces": '{"name"          ',
    "numbers": '{"name": "f", "arguments": {"a": 1' + "1" * 40,
}


def took(name: str, text: str, piece: int) -> float:
    """CPU seconds of this thread, so that others on the machine count for nothing."""
    machine = parser(name)
    began = time.thread_time()
    for at in range(0, len(text), piece):
        machine.feed(text[at : at + piece])
    machine.finish()
    return time.thread_time() - began


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_what_is_meant_to_hurt(name: str) -> None:
    """Against plain words of the same length: never more than a small multiple.  Backtracking would take hours."""
    plain = took(name, ("one word " * (SIZE // 9 + 1))[:SIZE], 64)
    for what, unit in UNITS.items():
        spent = took(name, (unit * (SIZE // len(unit) + 1))[:SIZE], 64)
        assert spent < 10 * plain + 1.0, (what, spent, plain)


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_a_megabyte(name: str) -> None:
    unit = UNITS["openings with a call"]
    assert took(name, (unit * (MEGABYTE // len(unit) + 1))[:MEGABYTE], 64) < 15.0
