"""Row 7: regular expressions and schemas that take for ever, or all memory, are given up in a process of their own."""

from __future__ import annotations

import time
from typing import Any

from tests.security.conftest import Attacked, is_refused

DEEP = 10_000
HUGE: list[dict[str, Any]] = [
    {"regex": "a{1,1000000000}"},
    {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    {"regex": "(" * DEEP + "a" + ")" * DEEP},
    {"regex": "[" * DEEP},
    {"regex": ".*".join("abcdefgh" * 2000)},
    {"grammar": "start: " + "(" * DEEP + '"a"' + ")" * DEEP},
    {"grammar": "root ::= " + "(" * DEEP + '"a"' + ")" * DEEP},
    {"json": "[" * DEEP},
    {"json": '{"items":' * DEEP + "{}" + "}" * DEEP},
    {"json": {"type": "string", "maxLength": 10**12, "minLength": 10**12}},
    {"json": {"type": "array", "minItems": 10**9, "items": {"type": "null"}}},
]
HARMLESS: list[dict[str, Any]] = [{"regex": "(a+)+b"}, {"regex": "(a|a)*c"}, {"regex": "(x+x+)+y"}, {"regex": "(.*)*d"}]


def ask(server: Attacked, form: dict[str, Any]) -> Any:
    return server.post("/v1/completions", {"prompt": "a" * 40, "max_tokens": 12, "structured_outputs": form})


def test_what_is_huge_is_refused_in_time(server: Attacked) -> None:
    with server.attacked():
        for form in HUGE:
            began = time.monotonic()
            is_refused(ask(server, form))
            assert time.monotonic() - began < 20, "five seconds of the worker, and starting it anew"
    assert ask(server, {"regex": "[ab]{2}"}).status_code == 200


def test_what_hurts_those_that_go_back_does_not_hurt(server: Attacked) -> None:
    """The matcher never goes back, so these are ordinary."""
    with server.attacked():
        for form in HARMLESS:
            began = time.monotonic()
            assert ask(server, form).status_code == 200
            assert time.monotonic() - began < 5
