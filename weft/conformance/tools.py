"""Tools and right calls of them, as the Berkeley function-calling leaderboard and Glaive's conversations have them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.conformance.count import folder

Call = tuple[str, dict[str, Any]]
ANSWERED = (
    "simple_python",
    "simple_java",
    "simple_javascript",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_parallel",
    "live_parallel_multiple",
)
TYPES = {
    "dict": "object",
    "hashmap": "object",
    "float": "number",
    "double": "number",
    "long": "integer",
    "tuple": "array",
    "arraylist": "array",
    "char": "string",
}
"""JSON schema's words for the leaderboard's; what is none of either ("any") says nothing."""
_JSON_TYPES = frozenset(("object", "number", "integer", "array", "string", "boolean", "null"))


@dataclass(frozen=True, slots=True)
class Sample:
    """tools: as in a request.  calls: a right answer, [] where the sample has none."""

    id: str
    tools: list[dict[str, Any]]
    calls: list[Call]


def samples(data: Path) -> Iterator[Sample]:
    """Every sample of the folder `tools` of `data`.  Raises ConfigError where it is not there."""
    place = folder(data, "tools")
    answers: dict[str, list[dict[str, Any]]] = {}
    for name in ANSWERED:
        for line in _lines(place / "bfcl" / "possible_answer" / f"BFCL_v4_{name}.json"):
            answers[line["id"]] = line["ground_truth"]
    for path in sorted((place / "bfcl").glob("BFCL_v4_*.json")):
        for line in _lines(path):
            if line.get("function"):
                yield Sample(line["id"], [_tool(one) for one in line["function"]], _answer(answers.get(line["id"], [])))
    yield from _glaive(place / "glaive" / "glaive_toolcall_en_demo.json")


def _glaive(path: Path) -> Iterator[Sample]:
    for i, talk in enumerate(json.loads(path.read_text(encoding="utf8"))):
        tools = [_tool(one) for one in json.loads(talk["tools"] or "[]")]
        said = [json.loads(m["value"]) for m in talk["conversations"] if m["from"] == "function_call"]
        if tools:
            yield Sample(f"glaive_{i}", tools, [(call["name"], call["arguments"]) for call in said])


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf8").splitlines():
        if line.strip():
            yield json.loads(line)


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    schema = _schema(function.get("parameters") or {"type": "object", "properties": {}})
    return {"type": "function", "function": {**function, "parameters": schema}}


def _schema(schema: Any) -> Any:
    """A schema with JSON schema's types, and without what is none of its words; names of properties are left alone."""
    if not isinstance(schema, dict):
        return schema
    out = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            word = TYPES.get(value.lower(), value.lower())
            if word in _JSON_TYPES:
                out[key] = word
        elif key == "properties":
            out[key] = {name: _schema(one) for name, one in value.items()}
        elif key == "items":
            out[key] = _schema(value)
        elif key in ("required", "enum", "description"):
            out[key] = value
    return out


def _answer(truth: list[dict[str, Any]]) -> list[Call]:
    """The first of the values that each parameter may have; what may be left out ("") is."""
    return [(name, _first(given)) for one in truth for name, given in one.items()]


def _first(given: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for key, may in given.items():
        values = may if isinstance(may, list) else [may]
        if values and values[0] != "":
            out[key] = _plain(values[0])
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return _first(value)
    return [_plain(one) for one in value] if isinstance(value, list) else value
