"""The grammar of right calls: what an answer has to be where a tool must be called, in the family's own form.

In Lark's syntax as llguidance reads it: `%json` is a JSON schema, `suffix` ends a text where it first comes.  Every argument is
held to the schema of its function; JSON is written with the spaces that templates write.  A function's parameters are those that
its schema has, unless it says itself that there may be others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from weft.front.reasoning import Marks
from weft.front.tools.events import Tools
from weft.front.tools.form import Form
from weft.front.tools.machine import Machine

MOST_CALLS = 8
"""In one answer that has to call: a model that goes on and on would end at its length, in the middle of a call."""
_SPACES = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}
_LOOSE = {**_SPACES, "whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,1}"}
_PLAIN = frozenset(("type", "properties", "required", "title", "description", "additionalProperties", "$schema"))
_NOTES = frozenset(("type", "title", "description", "default", "examples"))
_TEXT = "/(?s:.*)/"
_RANGE = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))
_LARGEST = 10**15
_FINEST = 1e-9
"""Numbers that a forced call may have, and their last digit, where its schema does not say: digits, too, can go on and on."""


def calls(form: Form, tools: Tools, *, parallel: bool, marks: Marks | None = None, inside: bool = False) -> str:
    """Lark for one call of a tool, or several.

    marks: of a thought that may come before them.  inside: the prompt has opened it, so it must end.
    """
    start, rules = _calls(form, tools, parallel)
    return _lark([*_thought(marks, inside), start], [*rules, *_thought_rules(marks)])


def answer(
    schema: Mapping[str, Any],
    form: Form,
    tools: Tools,
    *,
    parallel: bool,
    marks: Marks | None = None,
    inside: bool = False,
) -> str:
    """Lark for JSON of a schema, or calls of tools where there are any, behind a thought perhaps."""
    start, rules = _calls(form, tools, parallel) if tools else ("", [])
    start = f"({start} | answer)" if tools else "answer"
    said = "answer: %json " + json.dumps({**schema, "x-guidance": _LOOSE})
    return _lark([*_thought(marks, inside), start], [*rules, said, *_thought_rules(marks)])


def free(
    parser: type[Machine], tools: Tools, *, parallel: bool, marks: Marks | None = None, inside: bool = False
) -> str:
    """Lark for any text in which every call is right, as functions that are `strict` ask for.

    A mark that begins a call begins one wherever it stands.  Where calls are marked by being JSON from the first character
    on, an answer that begins like that is a call.
    """
    form, wild = parser.form, "(?s:.*)"
    no = [f"/{wild}/", *(f"~/{wild}{_pattern(marker)}{wild}/" for marker in parser.markers)]
    lead = next((marker for marker in parser.markers if form.written([("a", {})]).startswith(marker)), "")
    start, rules = _calls(
        form if form.open else replace(form, several=form.several and not lead), tools, parallel, lead
    )
    if lead:
        rules += [f"lead[suffix={_said(lead)}]: {_TEXT}"]
        start = f"(lead {start}){'*' if parallel else '?'} rest"
    else:
        no.append(f"~/[ \\t\\r\\n]*[{_pattern(parser.openings)}]{wild}/")
        start = f"({start} | rest)"
    return _lark(
        [*_thought(marks, inside), start], [*rules, "rest: REST", "REST: " + " & ".join(no), *_thought_rules(marks)]
    )


def _pattern(text: str) -> str:
    """A text as a regular expression in Lark."""
    return re.escape(text).replace("/", "\\/")


def _lark(start: list[str], rules: list[str]) -> str:
    return "\n".join(["start: " + " ".join(start), *rules]) + "\n"


def _calls(form: Form, tools: Tools, parallel: bool, lead: str = "") -> tuple[str, list[str]]:
    """(what stands in the rule of the start, other rules) for calls.  lead: what stands before them already."""
    head = "" if form.open else lead
    rules: list[str] = []
    for i, (name, schema) in enumerate(tools.items()):
        rules += (
            _bare(form, i, name, schema, head)
            if form.tag and in_bare_text(schema)
            else _json(form, i, name, schema, head)
        )
    most = MOST_CALLS if parallel and form.several else 1
    several = "call" if most == 1 else f"call ({_said(form.between)} call){{0,{most - 1}}}"
    choice = " | ".join(f"call_{i}" for i in range(len(tools)))
    return " ".join(filter(None, (_said(form.open.removeprefix(lead)), several, _said(form.close)))), [
        f"call: {choice}",
        *rules,
    ]


def _said(text: str) -> str:
    """A text as Lark writes it; nothing for none."""
    return json.dumps(text) if text else ""


def _thought(marks: Marks | None, inside: bool) -> list[str]:
    if marks is None:
        return []
    return ["thought"] if inside else [f"({_said(marks.begin)} thought)?"]


def _thought_rules(marks: Marks | None) -> list[str]:
    if marks is None:
        return []
    return [f"thought: thinking /[ \\n]{{0,2}}/\nthinking[suffix={_said(marks.end)}]: {_TEXT}"]


def _json(form: Form, i: int, name: str, schema: Mapping[str, Any], lead: str) -> list[str]:
    """A call whose arguments are one JSON object, without the mark that leads it."""
    head, middle, tail = form.parts
    parts = [_said(head.removeprefix(lead) + name + middle), f"arguments_{i}", _said(tail)]
    return [f"call_{i}: {' '.join(filter(None, parts))}", f"arguments_{i}: {_schema(closed(schema))}"]


def _schema(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _SPACES})


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema of an object, with no other properties than it has: what it allows is allowed by the schema as it was."""
    out = {"type": "object", **schema}
    properties, required = out.get("properties"), out.get("required", [])
    if not set(out) <= _PLAIN | {"$defs", "definitions"} or not isinstance(properties, Mapping):
        return out
    if isinstance(required, list) and all(isinstance(key, str) and key in properties for key in required):
        out.setdefault("additionalProperties", False)
        out["properties"] = {key: _closed_inside(value) for key, value in properties.items()}
    return out


def _closed_inside(schema: Any) -> Any:
    if isinstance(schema, Mapping) and schema.get("type") == "object" and isinstance(schema.get("properties"), Mapping):
        return closed(schema)
    if isinstance(schema, Mapping) and schema.get("type") == "array" and isinstance(schema.get("items"), Mapping):
        return {**schema, "items": _closed_inside(schema["items"])}
    return schema


def within(tools: Tools, room: int) -> Tools:
    """The same tools, for an answer of at most `room` tokens: a string without a bound of its own ends where it would fill about
    half of the room, a list where its items would, so that a model that goes on and on still ends its call.

    A token is taken for three characters, an item for eight tokens; bounds are powers of two, so that there are few grammars.
    Numbers have at most 15 digits before the point and 9 behind it.
    """
    return {name: _bounded(schema, _power(3 * room // 2), _power(room // 16)) for name, schema in tools.items()}


def _power(size: int) -> int:
    """The largest power of two that is no larger, and at least 16."""
    return 1 << max(size.bit_length() - 1, 4)


def _bounded(schema: Any, chars: int, items: int) -> Any:
    """chars: of a string.  items: of a list."""
    if not isinstance(schema, Mapping):
        return schema
    out = dict(schema)
    if out.get("type") == "string" and set(out) <= _NOTES | {"minLength"}:
        out["maxLength"] = max(chars, _least(out, "minLength"))
    if out.get("type") in ("integer", "number") and set(out) <= _NOTES | _RANGE:
        out |= _digits(out)
    if isinstance(out.get("properties"), Mapping):
        out["properties"] = {key: _bounded(value, chars, items) for key, value in out["properties"].items()}
    if out.get("type") == "array":
        out.setdefault("maxItems", max(items, _least(out, "minItems")))
        if isinstance(out.get("items"), Mapping):
            out["items"] = _bounded(out["items"], max(chars // items, 16), 16)
    return out


def _digits(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What bounds a number's digits; nothing where its own range is beyond them."""
    own = [schema[word] for word in _RANGE & set(schema)]
    if not all(type(bound) in (int, float) and -_LARGEST < bound < _LARGEST for bound in own):
        return {}
    found: dict[str, Any] = {} if schema["type"] == "integer" else {"multipleOf": _FINEST}
    if not {"minimum", "exclusiveMinimum"} & set(schema):
        found["minimum"] = -_LARGEST
    if not {"maximum", "exclusiveMaximum"} & set(schema):
        found["maximum"] = _LARGEST
    return found


def _least(schema: Mapping[str, Any], word: str) -> int:
    least = schema.get(word, 0)
    return least if isinstance(least, int) else 0


# ------------------------------------------------------------------------------------------ values in bare text


def in_bare_text(schema: Mapping[str, Any]) -> bool:
    """Whether arguments of this schema can be told in bare text, and be read back as what they are."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if (
        not set(schema) <= _PLAIN
        or not isinstance(required, Sequence)
        or not set(map(str, required)) <= set(properties)
    ):
        return False
    return all(_tellable(key, value) for key, value in properties.items())


def _tellable(key: str, schema: Any) -> bool:
    if not key or not key.isprintable() or set(key) & set("<> ") or not isinstance(schema, Mapping):
        return False
    if schema.get("type") == "string":
        words = schema.get("enum", ["a"])
        plain = isinstance(words, list) and words and all(isinstance(w, str) and w.strip() == w for w in words)
        longest = schema.get("maxLength", 1)
        plain = plain and type(longest) is int and longest > 0 and not {"enum", "maxLength"} <= set(schema)
        return (
            bool(plain)
            and set(schema) <= _NOTES | {"enum", "maxLength"}
            and not any(set(w) & set("\n<") for w in words)
        )
    return (
        isinstance(schema.get("type"), str)
        and not {"$ref", "enum"} & set(schema)
        and '"$ref"' not in json.dumps(schema)
    )


def _bare(form: Form, i: int, name: str, schema: Mapping[str, Any], lead: str) -> list[str]:
    """A call whose arguments are bare texts, in the order of the schema; one that is not required may be missing."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    parts, rules = [], []
    for j, (key, value) in enumerate(properties.items()):
        rule = f"value_{i}_{j}"
        parts.append(rule if key in required else f"{rule}?")
        head = _said(f"<parameter={key}>\n")
        if value["type"] != "string":
            rules.append(f'{rule}: {head} json_{i}_{j} "\\n</parameter>\\n"')
            rules.append(f"json_{i}_{j}: {_schema(_closed_inside(value))}")
        elif "enum" in value:
            words = " | ".join(json.dumps(word) for word in value["enum"])
            rules.append(f'{rule}: {head} ({words}) "\\n</parameter>\\n"')
        else:
            rules.append(f'{rule}: {head} text_{i}_{j} "\\n"')
            text = f"/(?s:.{{0,{value['maxLength']}}})\\n?/" if "maxLength" in value else _TEXT
            rules.append(f'text_{i}_{j}[suffix="</parameter>"]: {text}')
    head = _said(f"<{form.tag}>\n<function={name}>\n".removeprefix(lead))
    tail = _said(f"</function>\n</{form.tag}>")
    return [f"call_{i}: {' '.join([head, *parts, tail])}", *rules]
