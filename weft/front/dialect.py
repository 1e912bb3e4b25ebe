"""`Dialect`: how one model is told of tools, calls them, and thinks: what its chat template shows of that, and the user's word.

Where the template tells of no tools, or its calls have a form that there is no parser for, weft does what the template does
not: it tells of them in the first message, in words, and writes past calls and results as messages of the assistant and the
user.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from weft.errors import RequestError
from weft.front import reasoning, tools
from weft.front.grammars import PARAM
from weft.front.speech import Manner
from weft.front.template import ChatTemplate
from weft.front.text import ModelText
from weft.front.tools import grammar
from weft.front.tools.events import Tools
from weft.front.tools.form import to_json
from weft.front.tools.machine import Machine
from weft.front.tools.plain import Plain
from weft.types import Grammar

Message = dict[str, Any]

_NAME, _VALUE, _RESULT, _ID = "weft_shows_a_name", "weft_shows_a_value", "weft_shows_a_result", "abcde1234"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A function.",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "A word."}}},
    },
}
_ASKED: Message = {"role": "user", "content": "Hello."}
_CALL = {"id": _ID, "type": "function", "function": {"name": _NAME, "arguments": {"a": _VALUE}}}
_PAST: list[Message] = [
    _ASKED,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": _ID, "name": _NAME, "content": _RESULT},
]
_ESCAPED = "&#34;"
"""A quotation mark as some templates write it by mistake, where arguments are objects (`tojson | safe`, then added to a text)."""


class Dialect:
    """tool_parser, reasoning_parser: a name, or auto for what the template tells.  Raises ConfigError for unknown names."""

    def __init__(self, text: ModelText, tool_parser: str = "auto", reasoning_parser: str = "auto") -> None:
        self._text = text
        sources = text.template.sources()
        self._told = tools.chosen(tool_parser, sources)
        self.marks = reasoning.chosen(reasoning_parser, sources)

    @property
    def template(self) -> ChatTemplate:
        return self._text.template

    @property
    def parser(self) -> type[Machine]:
        """What reads this model's calls."""
        return self._told or Plain

    @cached_property
    def native(self) -> bool:
        """Whether the template tells the model of tools, and of calls in a form that there is a parser for.

        Found out by rendering, which blocks; as all of it, to be asked in a thread.
        """
        return self._told is not None and _NAME in _rendered(self._text.template, [_ASKED])

    @cached_property
    def recalls(self) -> bool:
        """Whether the template writes the calls and results of a conversation."""
        return all(word in self._past for word in (_NAME, _VALUE, _RESULT))

    @cached_property
    def wants_text(self) -> bool:
        """Whether the template writes arguments of past calls rightly only where they are JSON text."""
        return self.recalls and _ESCAPED in self._past

    @cached_property
    def _past(self) -> str:
        return _rendered(self._text.template, _PAST) if self.native else ""

    def manner(
        self,
        prompt: str,
        functions: Tools,
        *,
        parallel: bool = True,
        required: bool = False,
        strict: bool = False,
        room: int = 1 << 20,
        answer: Grammar | None = None,
        goes_on: str | None = None,
    ) -> Manner | None:
        """How answers to a prompt are to be read; None where they are text and nothing else.

        functions: what may be called; required: what must be; strict: rightly, where it is.  room: tokens for an answer.
        answer: what other answers are held to.  goes_on: the text that the answer goes on with, where it does.
        Raises RequestError.
        """
        marks, inside = self.marks, False
        if marks is not None and goes_on is not None:
            inside = marks.begin in goes_on and marks.end not in goes_on
            marks = marks if inside else None
        elif marks is not None:
            inside = marks.opened(prompt)
        parser = self.parser if functions else None
        if marks is None and parser is None:
            return None
        lark = None
        around: Any = {"parallel": parallel, "marks": marks, "inside": inside}
        if required:
            lark = grammar.calls(self.parser.form, grammar.within(functions, room), **around)
        elif answer is not None and answer.kind == "json":
            lark = grammar.answer(_schema(answer), self.parser.form, functions, **around)
        elif answer is not None and functions:
            raise RequestError(
                "tools go together with an answer in JSON, and with no other structured output; set tool_choice to none",
                param=PARAM,
            )
        elif parser is not None and strict:
            lark = grammar.free(parser, functions, **around)
        elif answer is not None:
            return None  # it holds from the first character on, so that no thought has room
        return Manner(marks=marks, inside=inside, parser=parser, tools=functions, parallel=parallel, grammar=lark)

    def conversation(
        self, messages: Sequence[Message], offered: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Message], Sequence[Mapping[str, Any]] | None]:
        """What the template is given: (messages, tools), of which it can make the prompt.  Blocks the first time."""
        past = any(m.get("tool_calls") or m["role"] == "tool" for m in messages)
        if not past and not offered:
            return list(messages), None
        found = _named(messages)
        if past and not self.recalls:
            found = in_words(found, self.parser)
        elif past:
            found = [_fitted(m, self.parser, self.wants_text) for m in found]
        if not offered or self.native:
            return found, offered or None
        return told_of(found, offered, self.parser), None


def _schema(answer: Grammar) -> dict[str, Any]:
    """The JSON schema of a grammar, as an object.  Raises RequestError."""
    try:
        schema = json.loads(answer.source)
    except (ValueError, RecursionError):
        schema = None
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise RequestError(f"{PARAM}.json must be a JSON schema that something fits: an object, or true", param=PARAM)
    return schema


def _rendered(template: ChatTemplate, messages: Sequence[Message]) -> str:
    try:
        return template.render(messages, tools=[_TOOL], add_generation_prompt=False)
    except RequestError:
        return ""


def _named(messages: Iterable[Message]) -> list[Message]:
    """Results with the name of the function that they are of, which some templates ask for and clients leave out."""
    names: dict[str, str] = {}
    out = []
    for message in messages:
        for call in message.get("tool_calls") or ():
            names[call["id"]] = call["function"]["name"]
        name = names.get(message.get("tool_call_id", "")) if message["role"] == "tool" else None
        out.append({"name": name, **message} if name else message)
    return out


def _fitted(message: Message, parser: type[Machine], text: bool) -> Message:
    """A message whose calls are such as the template takes: their ids, and their arguments where these must be text."""
    fitted = dict(message)
    if message.get("tool_calls"):
        fitted["tool_calls"] = calls = [{**call, "id": parser.fit_id(call["id"])} for call in message["tool_calls"]]
        for call in calls if text else ():
            arguments = call["function"].get("arguments")
            said = arguments if isinstance(arguments, str) else to_json(arguments)
            call["function"] = {**call["function"], "arguments": said}
    if message["role"] == "tool":
        fitted["tool_call_id"] = parser.fit_id(message.get("tool_call_id", ""))
    return fitted


def in_words(messages: Iterable[Message], parser: type[Machine]) -> list[Message]:
    """Calls as text of the assistant, and results as text of the user, several in one message."""
    out: list[Message] = []
    results = False
    for message in messages:
        if message["role"] == "tool":
            of = f" of {message['name']}" if message.get("name") else ""
            text = f"Result{of}:\n{message['content']}"
            if results:
                out[-1]["content"] += f"\n\n{text}"
            else:
                out.append({"role": "user", "content": text})
        elif message.get("tool_calls"):
            calls = [(c["function"]["name"], _mapping(c["function"].get("arguments"))) for c in message["tool_calls"]]
            parts = [message.get("content"), parser.form.written(calls)]
            rest = {k: v for k, v in message.items() if k != "tool_calls"}
            out.append({**rest, "content": "\n".join(part for part in parts if part)})
        else:
            out.append(dict(message))
        results = message["role"] == "tool"
    return out


def _mapping(arguments: Any) -> Mapping[str, Any]:
    return arguments if isinstance(arguments, Mapping) else {}


def told_of(messages: Sequence[Message], offered: Sequence[Mapping[str, Any]], parser: type[Machine]) -> list[Message]:
    """Messages whose first one, a system message's or a user's, tells of the tools and of how to call them."""
    functions = "\n".join(to_json(tool["function"]) for tool in offered)
    form = parser.form.written([("NAME", {"PARAMETER": "VALUE"})])
    text = (
        f"You may call functions. There are, one JSON object in a line each:\n\n{functions}\n\n"
        f"To call one, answer with this and nothing else:\n\n{form}\n\n"
        "The result comes with the next message. Where no function helps, answer in words."
    )
    first = messages[0]
    if first["role"] not in ("system", "user"):
        return [{"role": "system", "content": text}, *messages]
    parts = [first["content"], text] if first["role"] == "system" else [text, first["content"]]
    return [{**first, "content": "\n\n".join(part for part in parts if part)}, *messages[1:]]
