"""Row 4: schemas, regular expressions and grammars that are none are a 400, whatever they are, and the engine lives."""

from __future__ import annotations

from typing import Any

from tests.security.conftest import Attacked, is_refused

WRONG: list[dict[str, Any]] = [
    {"structured_outputs": {"regex": "("}},
    {"structured_outputs": {"regex": "[z-a]"}},
    {"structured_outputs": {"regex": "a{5,4}"}},
    {"structured_outputs": {"regex": "\\"}},
    {"structured_outputs": {"regex": "(?P<x"}},
    {"structured_outputs": {"grammar": "start: missing"}},
    {"structured_outputs": {"grammar": "root ::= ("}},
    {"structured_outputs": {"grammar": "\u0000"}},
    {"structured_outputs": {"choice": []}},
    {"structured_outputs": {"json": {"type": "strin"}}},
    {"structured_outputs": {"json": "{"}},
    {"structured_outputs": {"json": {"$ref": "#"}}},
    {"structured_outputs": {"json": {"$ref": "file:///etc/passwd"}}},
    {"structured_outputs": {"json": {"pattern": "(", "type": "string"}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 7}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": False}}},
    {"response_format": {"type": "xml"}},
]


def test_they_are_refused(server: Attacked) -> None:
    with server.attacked():
        for wrong in WRONG:
            for path, body in (
                ("/v1/completions", {"prompt": "a", "max_tokens": 4}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4}),
            ):
                is_refused(server.post(path, {**body, **wrong}))
