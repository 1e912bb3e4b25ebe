"""Suite `tools`: tools and right calls of them, in the form of each family, read by its parser and held to by its grammar.

One sample is a set of tools; it counts as enforced where, in every family's form,

    every right call is read back as what it is, given at once and a character at a time,
    the grammar of a forced call takes every right one, and none of what is made wrong on purpose: a function that nobody
    offered, a required parameter left out, a value of another type, and answers of the leaderboard that break their own schema.

It is refused where a schema cannot be held to.  Arguments are written in the order of their schema, as a grammar asks for.
The samples are the Berkeley function-calling leaderboard's and Glaive's conversations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weft.conformance.count import Count, folder
from weft.conformance.schema import BYTES
from weft.errors import RequestError
from weft.exec.vocabulary import VocabularyShelf
from weft.front.openai.offer import offer_of
from weft.front.openai.structs import ChatRequest
from weft.front.tools import PARSERS
from weft.front.tools.events import Arguments, Begun, Ended, Event, Tools
from weft.front.tools.form import Form
from weft.front.tools.grammar import calls as grammar_of
from weft.front.tools.grammar import in_bare_text
from weft.front.tools.machine import Machine
from weft.registry import Part
from weft.slots import SLOTS, Constrain, GrammarPath
from weft.types import Grammar

Begin = Callable[[str], GrammarPath]
"""Lark to the beginning of its grammar.  Raises RequestError for what is refused."""
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


def run(data: Path) -> Count:
    """Over the folder `tools` of `data`.  Raises ConfigError where it is not there."""
    return judge(samples(data), weft())


def weft() -> Begin:
    """Grammars as the server holds answers to them."""
    constrain: Constrain = Part("constrain", SLOTS["constrain"].asked or "").build()
    constrain.attach(VocabularyShelf(lambda: BYTES))
    return lambda source: constrain.begin(Grammar("grammar", source))


def judge(found: Iterable[Sample], begin: Begin, parsers: Iterable[type[Machine]] = tuple(PARSERS.values())) -> Count:
    """Count what becomes of the samples in the forms of some families."""
    count, families = Count("tools"), list(parsers)
    for sample in found:
        count.total += 1
        before = count.wrong_accept, count.wrong_reject
        try:
            tools = offer_of(ChatRequest(tools=sample.tools)).functions
            for parser in families:
                _judge(count, sample, tools, parser, begin)
        except RequestError:
            count.refused += 1
            count.wrong_accept, count.wrong_reject = before
            continue
        count.enforced += before == (count.wrong_accept, count.wrong_reject)
    return count


def _judge(count: Count, sample: Sample, tools: Tools, parser: type[Machine], begin: Begin) -> None:
    """One sample in one form."""
    path = begin(grammar_of(parser.form, tools, parallel=True))
    for name, given in sample.calls:
        call = (name, ordered(tools[name], given))
        text, where = written(parser.form, tools, call), f"{parser.name}: {sample.id} {name}"
        right = fits(tools[name], given)
        for pieces in ([text], text):
            if read(parser, tools, pieces) != [call]:
                count.rejected_wrongly(f"{where}, by the parser")
        if takes(path, text) != right:
            (count.rejected_wrongly if right else count.accepted_wrongly)(f"{where}, by the grammar")
        for wrong in made_wrong(tools[name], call):
            text = written(parser.form, tools, wrong)
            said = read(parser, tools, [text])
            if any(other not in tools for other, _ in said):
                count.accepted_wrongly(f"{where}, by the parser: {text}")
            valid = bool(said) and all(fits(tools[other], arguments) for other, arguments in said)
            if takes(path, text) and not valid:
                count.accepted_wrongly(f"{where}, by the grammar: {text}")


def written(form: Form, tools: Tools, call: Call) -> str:
    """A call in a form, in bare text only where its schema lets it be read back."""
    bare = in_bare_text(tools.get(call[0], {}))
    return (form if bare else replace(form, tag="")).written([call])


def read(parser: type[Machine], tools: Tools, pieces: Iterable[str]) -> list[Call]:
    """The whole calls that a parser finds."""
    machine, arguments, found = parser(tools), "", []
    name = ""

    def take(events: list[Event]) -> None:
        nonlocal name, arguments
        for event in events:
            if isinstance(event, Begun):
                name, arguments = event.name, ""
            elif isinstance(event, Arguments):
                arguments += event.text
            elif isinstance(event, Ended):
                found.append((name, json.loads(arguments)))

    for piece in pieces:
        take(machine.feed(piece))
    take(machine.finish())
    return found


def takes(path: GrammarPath, text: str) -> bool:
    """Whether a grammar has a text."""
    tokens = [*text.encode(), 256]
    return path.fork().advance(tokens) == len(tokens)


def made_wrong(schema: Mapping[str, Any], call: Call) -> Iterator[Call]:
    """Calls that are not right: of another function, without a required parameter, with a value of another type."""
    name, given = call
    yield f"{name}_not", given
    for key in list(schema.get("required", []))[:1]:
        yield name, {other: value for other, value in given.items() if other != key}
    for key, value in given.items():
        kind = schema.get("properties", {}).get(key, {}).get("type")
        if kind is not None:
            yield name, {**given, key: {"n": [value]} if kind != "object" else [value]}
            return


def fits(schema: Any, value: Any) -> bool:
    """Whether a value is valid, for the words that the samples' schemas use; members that a schema does not name are not."""
    if not isinstance(schema, Mapping):
        return True
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "type" in schema and not _is(schema["type"], value):
        return False
    if isinstance(value, dict):
        inner = schema.get("properties", {})
        named = "properties" not in schema or set(value) <= set(inner)
        return (
            named
            and set(schema.get("required", [])) <= set(value)
            and all(fits(inner.get(k), v) for k, v in value.items())
        )
    return not isinstance(value, list) or all(fits(schema.get("items"), one) for one in value)


def _is(kind: str, value: Any) -> bool:
    if kind in ("number", "integer"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind == "number" or float(value).is_integer())
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    return isinstance(value, kinds[kind])


def ordered(schema: Any, value: Any) -> Any:
    """A value whose objects have their members in the order of the schema, and whole numbers no fraction."""
    inner = schema if isinstance(schema, Mapping) else {}
    if isinstance(value, dict):
        listed = [key for key in inner.get("properties", {}) if key in value]
        keys = [*listed, *(key for key in value if key not in listed)]
        return {key: ordered(inner.get("properties", {}).get(key), value[key]) for key in keys}
    if isinstance(value, list):
        return [ordered(inner.get("items"), one) for one in value]
    whole = inner.get("type") == "integer" and isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


# ---------------------------------------------------------------------------------------------- the data


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
    out: dict[str, Any] = {}
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
