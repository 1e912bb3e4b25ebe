"""What a parser of tool calls says while text comes in, and the protocol of such parsers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import msgspec


class Text(msgspec.Struct, frozen=True):
    """Text for the reader."""

    text: str


class Begun(msgspec.Struct, frozen=True):
    """A call whose name is known.  index: 0, 1, ... in the order of the output."""

    index: int
    id: str
    name: str


class Arguments(msgspec.Struct, frozen=True):
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


class Ended(msgspec.Struct, frozen=True):
    """A call is whole: its pieces of arguments make one JSON object."""

    index: int


class Broken(msgspec.Struct, frozen=True):
    """A call that had begun did not become whole.

    text: all that the model wrote of it, as it wrote it.  cut: it was right as far as it came when the output ended.
    """

    index: int
    text: str
    cut: bool


Event = Text | Begun | Arguments | Ended | Broken
Tools = Mapping[str, Mapping[str, Any]]
"""Functions that may be called, by name, with the JSON schema of their parameters."""


class ToolParser(Protocol):
    """Text of one output in, however it is cut; events out.  The work is linear in the text.

    Text that is no call comes out as it went in; white space around calls is dropped.  What begins like a call and is none
    (wrong syntax, a name that nobody offered) comes out as text.
    """

    name: ClassVar[str]

    def __init__(self, tools: Tools | None = None, new_id: Callable[[], str] | None = None) -> None:
        """tools: what may be called; None for any name.  new_id: makes the ids of calls."""

    def feed(self, text: str) -> list[Event]:
        """What this text adds."""

    def finish(self) -> list[Event]:
        """What was held back: the output has ended."""
