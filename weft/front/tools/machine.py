"""`Machine`: what the parsers of all families share.

A family's grammar is a generator that is sent one character after the other, so it cannot see how the text was cut, and
never looks back.  What it has read and cannot use it gives back (`unread`), to be sent once more; a character is given back
at most a few times, so the work is linear in the text.  `steps` counts it.
"""

from __future__ import annotations

import json
import string
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator
from typing import ClassVar, NoReturn, TypeVar

from weft.front.detokenize import automaton
from weft.front.ids import random_bytes
from weft.front.tools.events import Arguments, Begun, Broken, Ended, Event, Text, Tools
from weft.front.tools.form import Form
from weft.front.tools.value import BAD, DONE, OVER, SPACE, Value, is_json

T = TypeVar("T")
Reading = Generator[None, str, T]
"""A grammar: is sent characters ("" at the end of the output), returns what it made of them."""

END = ""
NAME_CHARS = frozenset(string.ascii_letters + string.digits + "_-.:")
MAX_NAME = 128


class Malformed(Exception):
    """What was read is no call after all."""


def call_id() -> str:
    """An id as OpenAI's look."""
    return "call_" + random_bytes(12).hex()


class Machine(ABC):
    """A parser of tool calls (see `events.ToolParser`).  A family gives its name, its form, what begins a call, and `calls`.

    markers: texts that begin calls, wherever they stand.  openings: characters that do so where nothing but white space came
    before, or behind a call.  special: marks of the form that may be special tokens of the tokenizer, which must be kept in
    the text.
    """

    name: ClassVar[str]
    form: ClassVar[Form]
    markers: ClassVar[tuple[str, ...]] = ()
    openings: ClassVar[str] = ""
    special: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tools: Tools | None = None, new_id: Callable[[], str] | None = None) -> None:
        self.tools = tools
        self.new_id = new_id or self.own_id
        self.steps = 0
        self._events: list[Event] = []
        self._text: list[str] = []
        self._pieces: list[str] = []
        self._again: deque[str] = deque()
        self._inside = False
        self._raw: list[str] = []  # of what may be a call, as the model wrote it
        self._begun = 0
        self._open = False
        self._quiet = True  # nothing but white space since the beginning, or since a call
        self._grammar = self._read()
        next(self._grammar)

    @staticmethod
    def own_id() -> str:
        """A new id for a call."""
        return call_id()

    @staticmethod
    def fit_id(id: str) -> str:
        """An id, whoever made it, as the family's templates take it."""
        return id

    @abstractmethod
    def calls(self, marker: str) -> Reading[None]:
        """Read what follows a marker or an opening.  Raises Malformed where it is no call."""

    # ------------------------------------------------------------------------------------------ in and out

    def feed(self, text: str) -> list[Event]:
        for char in text:
            self._send(char)
        return self._drain()

    def finish(self) -> list[Event]:
        try:
            self._send(END)
        except StopIteration:
            pass
        return self._drain()

    def _send(self, char: str) -> None:
        again = self._again
        while True:
            self.steps += 1
            if self._inside and char:
                self._raw.append(char)
            self._grammar.send(char)
            if not again:
                return
            char = again.popleft()

    def unread(self, read: list[str]) -> None:
        """Give back the characters that were read last."""
        del self._raw[len(self._raw) - sum(map(bool, read)) :]
        self._again.extendleft(reversed(read))

    def fail(self, char: str) -> NoReturn:
        """The character that was read last cannot stand where it stands."""
        self.unread([char])
        raise Malformed

    def _drain(self) -> list[Event]:
        self._flush()
        events, self._events = self._events, []
        return events

    def _flush(self) -> None:
        if self._text:
            self._events.append(Text("".join(self._text)))
            self._text = []
        if self._pieces:
            self._events.append(Arguments(self._begun - 1, "".join(self._pieces)))
            self._pieces = []

    # ------------------------------------------------------------------------------------------ between calls

    def _read(self) -> Reading[None]:
        while True:
            marker = yield from self._between()
            if marker is None:
                return
            try:
                yield from self.calls(marker)
            except Malformed:
                self._give_up()
            self._inside = False

    def _between(self) -> Reading[str | None]:
        """Give text out until a marker is complete, and return it; None at the end.

        White space is held until it is known what follows it: what stands around calls is dropped.
        """
        machine, node = automaton(self.markers), 0
        space: list[str] = []
        held = ""
        while True:
            char = yield
            if char == END:
                self._show(space, held)
                if not (self._quiet and self._begun):
                    self._text += space
                return None
            node = machine.step(node, char)
            held += char
            hit = machine.hit[node]
            if hit is None and held == char and self._quiet and char in self.openings:
                hit = char
            cut = len(held) - (len(hit) if hit else machine.depth[node])
            if cut:
                self._show(space, held[:cut])
                held = held[cut:]
            if hit:
                self._inside, self._raw = True, [*space, *held]
                return hit

    def _show(self, space: list[str], text: str) -> None:
        """Give out held white space and text, but for white space at the end, which is held from now on."""
        for char in text:
            if char in SPACE:
                space.append(char)
            else:
                self._text += space
                self._text.append(char)
                space.clear()
                self._quiet = False

    def _give_up(self) -> None:
        """Everything of what is no call comes out as text."""
        self._flush()
        raw, self._raw = "".join(self._raw), []
        if self._open:
            self._open = False
            self._events.append(Broken(self._begun - 1, raw, cut=bool(self._again) and self._again[0] == END))
        elif raw:
            self._text.append(raw)
        self._quiet = self._quiet and not raw

    # ------------------------------------------------------------------------------------------ calls

    def begin(self, name: str, id: str | None = None) -> None:
        """A call's name is known."""
        self._flush()
        self._events.append(Begun(self._begun, id or self.new_id(), name))
        self._begun += 1
        self._open = True

    def argue(self, text: str) -> None:
        """A piece of the arguments of the call that was begun last."""
        self._pieces.append(text)

    def end(self) -> None:
        """The call is whole."""
        self._flush()
        self._events.append(Ended(self._begun - 1))
        self._open, self._quiet, self._raw = False, True, []

    def known(self, name: str) -> bool:
        """Whether such a function may be called."""
        right = 0 < len(name) <= MAX_NAME and NAME_CHARS.issuperset(name)
        return right and (self.tools is None or name in self.tools)

    # ------------------------------------------------------------------------------------------ pieces of grammars

    def solid(self) -> Reading[str]:
        """The next character that is no white space."""
        while True:
            char = yield
            if not char or char not in SPACE:
                return char

    def literal(self, text: str) -> Reading[None]:
        """Exactly this text."""
        for want in text:
            char = yield
            if char != want:
                self.fail(char)

    def optional(self, *texts: str) -> Reading[str | None]:
        """White space and one of some texts, none of which begins another one; or nothing at all, which is None."""
        read: list[str] = []
        found = ""
        while True:
            char = yield
            read.append(char)
            if found or not char or char not in SPACE:
                found += char
                if found in texts and char:
                    return found
                if not char or not any(text.startswith(found) for text in texts):
                    self.unread(read)
                    return None

    def separated(self, separators: str, opening: str) -> Reading[bool]:
        """A separator, if any, and an opening, with white space around them; or nothing at all."""
        read: list[str] = []
        left = separators
        while True:
            char = yield
            read.append(char)
            if char == opening:
                return True
            if char and char in left:
                left = ""
            elif not char or char not in SPACE:
                self.unread(read)
                return False

    def listed(self) -> Reading[None]:
        """After `[`: calls as objects, parted by commas."""
        char = yield from self.solid()
        while True:
            if char != "{":
                self.fail(char)
            yield from self.object()
            char = yield from self.solid()
            if char == "]":
                return
            if char != ",":
                self.fail(char)
            char = yield from self.solid()

    def value(self, first: str, take: Callable[[str], None]) -> Reading[None]:
        """One JSON value that begins with `first`; each of its characters is given to `take`."""
        value, char = Value(), first
        while True:
            told = value.push(char)
            if told == BAD:
                self.fail(char)
            if told == OVER:
                self.unread([char])
                return
            take(char)
            if told == DONE:
                return
            char = yield

    def string(self, first: str) -> Reading[str]:
        """A JSON string that begins with `first`, decoded."""
        if first != '"':
            self.fail(first)
        read: list[str] = []
        yield from self.value(first, read.append)
        text: str = json.loads("".join(read))
        return text

    def object(self, keys: tuple[str, ...] = ("arguments", "parameters")) -> Reading[None]:
        """After `{`: one call, as `{"name": ..., "arguments": {...}}`; keys in any order, an `id` or a `type` beside them.

        Arguments go out as they come once the name is known.  They may be missing, or be an object written in a string.
        """
        found: dict[str, str] = {}
        char = yield from self.solid()
        while char != "}" or not found:
            key = yield from self.string(char)
            slot = "arguments" if key in keys else key
            if slot in found or slot not in ("name", "id", "type", "arguments"):
                raise Malformed
            yield from self._colon()
            char = yield from self.solid()
            if slot == "arguments":
                found[slot] = yield from self._object_arguments(char, found)
            else:
                found[slot] = yield from self.string(char)
            if slot == "name" and not self.known(found[slot]):
                raise Malformed
            char = yield from self.solid()
            if char == ",":
                char = yield from self.solid()
                if char == "}":
                    self.fail(char)
            elif char != "}":
                self.fail(char)
        if "name" not in found:
            raise Malformed
        if not self._open:
            written = as_object(found.get("arguments", "{}"))
            self.begin(found["name"], found.get("id"))
            self.argue(written)
        self.end()

    def _object_arguments(self, first: str, found: dict[str, str]) -> Reading[str]:
        """Arguments: sent out if the name is known and they are an object, else returned as they are written."""
        if "name" in found and first == "{":
            self.begin(found["name"], found.get("id"))
            yield from self.value(first, self.argue)
            return ""
        held: list[str] = []
        yield from self.value(first, held.append)
        return "".join(held)

    def _colon(self) -> Reading[None]:
        char = yield from self.solid()
        if char != ":":
            self.fail(char)


def as_object(written: str) -> str:
    """JSON text of an object, given as such or as a JSON string that holds it.  Raises Malformed."""
    if written.startswith('"'):
        written = json.loads(written).strip(SPACE)
        if not is_json(written):
            raise Malformed
    if not written.startswith("{"):
        raise Malformed
    return written
