"""Qwen3-Coder, Qwen3.5, Nemotron 3, Step 3.5: `<function=NAME><parameter=KEY>VALUE</parameter>...</function>` in `<tool_call>`.

Source: the models' templates.  A value is bare text, what it means is said by the schema of its parameter: for a string it goes
out as it comes, for another type it is JSON (or Python's word for true, false and null), and a string where it is neither.
One line break after `<parameter=KEY>` and one before `</parameter>` belong to the form.  A value ends at the `</parameter>`
that a `<parameter=` or a `</function>` follows, so the tag itself may stand in a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.front.detokenize import automaton
from weft.front.tools.form import Form, to_json
from weft.front.tools.machine import END, Machine, Malformed, Reading
from weft.front.tools.value import SPACE, is_json

MAX_KEY = 256
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_CLOSE = "</parameter>"
_NEXT = ("<parameter=", "</function>")


class Qwen3Coder(Machine):
    name = "qwen3_coder"
    form = Form(call='<tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call>', tag="tool_call")
    markers = ("<tool_call>", "<function=")
    special = ("<tool_call>", "</tool_call>")

    def calls(self, marker: str) -> Reading[None]:
        closing = f"</{self.form.tag}>"
        if marker == f"<{self.form.tag}>":
            char = yield from self.solid()
            if char == "{":  # as the older models of the family write
                yield from self.object()
                yield from self.optional(closing)
                return
            if char != "<":
                self.fail(char)
            yield from self.literal("function=")
        yield from self.function()
        yield from self.optional(closing)

    def function(self) -> Reading[None]:
        """After `<function=`: the name and the parameters."""
        name = yield from self.until_bracket()
        if not self.known(name):
            raise Malformed
        schema = (self.tools or {}).get(name, {}).get("properties")
        properties = schema if isinstance(schema, Mapping) else {}
        seen: set[str] = set()
        following = yield from self.optional(*_NEXT)
        if following is None:
            raise Malformed
        self.begin(name)
        self.argue("{")
        while following != _NEXT[1]:
            key = yield from self.until_bracket()
            if key in seen:
                raise Malformed
            self.argue((", " if seen else "") + to_json(key) + ": ")
            seen.add(key)
            following = yield from self.parameter(kinds(properties.get(key)))
        self.argue("}")
        self.end()

    def until_bracket(self) -> Reading[str]:
        read: list[str] = []
        while True:
            char = yield
            if char == ">":
                return "".join(read).strip(SPACE)
            if char in (END, "<", "\n") or len(read) >= MAX_KEY:
                self.fail(char)
            read.append(char)

    def parameter(self, types: frozenset[str]) -> Reading[str]:
        """A value and its end: what follows it, of `_NEXT`."""
        value = _Argument(self, types)
        machine, node = automaton((_CLOSE,)), 0
        held = ""
        first = True
        while True:
            char = yield
            if char == END:
                self.fail(char)
            if first and char == "\n":
                first = False
                continue
            first = False
            node = machine.step(node, char)
            held += char
            if machine.hit[node]:
                following = yield from self.optional(*_NEXT)
                if following is not None:
                    value.take(held[: -len(_CLOSE)])
                    value.close()
                    return following
                node = 0
            cut = len(held) - machine.depth[node]
            value.take(held[:cut])
            held = held[cut:]


class _Argument:
    """What becomes of one value: pieces of a JSON string at once, or JSON when it is whole."""

    def __init__(self, machine: Machine, types: frozenset[str]) -> None:
        self.machine = machine
        self.types = types
        self.live = types == {"string"}
        self.held: list[str] = []
        if self.live:
            machine.argue('"')

    def take(self, text: str) -> None:
        """Line breaks at the end are held, since the last of them does not belong to the value."""
        for char in text:
            if self.live and char != "\n":
                self._say("".join(self.held) + char)
                self.held.clear()
            else:
                self.held.append(char)

    def _say(self, text: str) -> None:
        self.machine.argue(to_json(text)[1:-1])

    def close(self) -> None:
        if self.held and self.held[-1] == "\n":
            self.held.pop()
        text = "".join(self.held)
        if self.live:
            self._say(text)
            self.machine.argue('"')
        else:
            self.machine.argue(as_json(text, self.types))


def kinds(schema: Any) -> frozenset[str]:
    """The JSON types that a parameter's schema allows, as far as it says them plainly; empty where it does not."""
    if not isinstance(schema, Mapping):
        return frozenset()
    said = schema.get("type")
    if isinstance(said, str):
        return frozenset((said,))
    if isinstance(said, list):
        return frozenset(one for one in said if isinstance(one, str))
    enum = schema.get("enum")
    if isinstance(enum, list) and enum and all(isinstance(one, str) for one in enum):
        return frozenset(("string",))
    return frozenset()


def as_json(text: str, types: frozenset[str]) -> str:
    """The JSON text of a value that is no plain string: JSON as it is, Python's words, and anything else as a string."""
    bare = text.strip(SPACE)
    written = _PYTHON.get(bare, bare)
    if is_json(written) and not ("string" in types and _type(written) not in types):
        return written
    return to_json(text)


def _type(written: str) -> str:
    """The JSON type of a JSON text; a whole number counts as an integer."""
    if written[0] in "tf":
        return "boolean"
    named = {"n": "null", "{": "object", "[": "array", '"': "string"}.get(written[0])
    return named or ("integer" if written.lstrip("-").isdigit() else "number")
