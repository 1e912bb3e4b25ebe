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
    {"regex": "((((a{1,99}b){1,99}c){1,99}d){1,99}e){1,99}"},
    {"regex": "(.*a){30}.{2000}b"},
    {"regex": "|".join(f"{i}.*{i}" for i in range(20_000))},
    {"grammar": "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(200)) + 'a200: "x"\n'},
    {"regex": "[" * DEEP},
    {"regex": ".*".join("abcdefgh" * 2000)},
    {"grammar": "start: " + "(" * DEEP + '"a"' + ")" * DEEP},
    {"grammar": "root ::= " + "(" * DEEP + '"a"' + ")" * DEEP},
    {"json": "[" * DEEP},
    {"json": '{"items":' * DEEP + "{}" + "}" * DEEP},
    {"json": {"type": "string", "maxLength": 10**12, "minLength": 10**12}},
    {"json": {"type": "array", "minItems": 10**9, "items": {"type": "null"}}},
]
WIDE = {
    "properties": {f"k{i}": {"type": "string", "pattern": f"^(a|b){{1,{i % 50 + 1}}}$"} for i in range(5000)},
    "allOf": [{"properties": {f"k{i}": {"pattern": f"^.{{1,{i % 90 + 1}}}c"}}} for i in range(400)],
}
HARMLESS: list[dict[str, Any]] = [{"regex": "(a+)+b"}, {"regex": "(a|a)*c"}, {"regex": "(x+x+)+y"}, {"regex": "(.*)*d"}]


def ask(server: Attacked, form: dict[str, Any]) -> Any:
    return server.post("/v1/completions", {"prompt": "a" * 40, "max_tokens": 12, "structured_outputs": form})


def test_what_is_huge_ends_in_time(server: Attacked) -> None:
    """Refused, or taken where the library goes through it lazily; soon either way, and the next one is served."""
    with server.attacked():
        for form in HUGE:
            began = time.monotonic()
            answer = ask(server, form)
            if answer.status_code != 200:  # also where it only shows in a step
                is_refused(answer)
            assert time.monotonic() - began < 20, "five seconds of the worker, and starting it anew"
    assert ask(server, {"regex": "[ab]{2}"}).status_code == 200


def test_what_takes_its_time_is_given_up(server: Attacked) -> None:
    with server.attacked():
        answer = ask(server, {"json": WIDE})
        is_refused(answer)
        assert ask(server, {"regex": "[ab]{2}"}).status_code == 200


def test_what_hurts_those_that_go_back_does_not_hurt(server: Attacked) -> None:
    """The matcher never goes back, so these are ordinary."""
    with server.attacked():
        for form in HARMLESS:
            began = time.monotonic()
            assert ask(server, form).status_code == 200
            assert time.monotonic() - began < 5
