"""Row 3: a tool whose parameters are no JSON schema is a 400, and the engine lives."""

from __future__ import annotations

from typing import Any

from tests.security.conftest import Attacked, is_refused

WRONG: list[Any] = [
    {"type": "strin"},
    {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}},
    {"type": "object", "properties": {"a": {"type": "string", "pattern": "[z-a]"}}},
    {"type": "object", "properties": {"a": {"type": ["string", 5]}}},
    {"type": "object", "properties": {"a": {"pattern": {"x": 1}}}},
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}},
    {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:1/schema.json"}}},
    {"type": "object", "properties": []},
    {"type": "object", "required": "a"},
    {"type": 7},
    [],
    "object",
]
SAY = [{"role": "user", "content": "a"}]


def test_they_are_refused(server: Attacked) -> None:
    with server.attacked():
        for schema in WRONG:
            function = {"name": "f", "parameters": schema}
            for path, body in (
                ("/v1/chat/completions", {"messages": SAY, "tools": [{"type": "function", "function": function}]}),
                ("/v1/responses", {"input": "a", "tools": [{"type": "function", **function}]}),
            ):
                is_refused(server.post(path, {**body, "tool_choice": "required"}))
            body = {"messages": SAY, "max_tokens": 1, "tools": [{"name": "f", "input_schema": schema}]}
            is_refused(server.post("/v1/messages", {**body, "tool_choice": {"type": "any"}}))


def test_what_nothing_fits_harms_nobody(server: Attacked) -> None:
    """A schema that no value fits is one all the same: refused, or an answer that calls nothing."""
    with server.attacked():
        for schema in ({"enum": []}, {"type": "integer", "minimum": 5, "maximum": 4}, False):
            function = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}, "required": ["a"]}}
            body = {"messages": SAY, "tools": [{"type": "function", "function": function}], "max_tokens": 30}
            answer = server.post("/v1/chat/completions", {**body, "tool_choice": "required"})
            assert answer.status_code in (200, 400)


def test_names_that_are_none(server: Attacked) -> None:
    with server.attacked():
        for name in ("", None, 5, "a" * 10_000, "a b", "a\n", "\u0000", {"x": 1}):
            tool = {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
            is_refused(server.post("/v1/chat/completions", {"messages": SAY, "tools": [tool]}))
