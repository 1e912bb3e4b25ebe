"""`Manner`: how the answers to a prompt are to be read.  `Speech`: one of them while it comes: thoughts, text and tool calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from weft.front.reasoning import Marks, Reasoning
from weft.front.tools.events import Arguments, Begun, Broken, Ended, Event, Text, Tools
from weft.front.tools.machine import Machine


class Thought(msgspec.Struct, frozen=True):
    """Text that the model thinks before it answers."""

    text: str


Said = Thought | Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """marks: of thoughts; None where they are left in the text.  inside: the prompt has opened one.

    parser: of tool calls; None where none may come.  tools: what may be called.  parallel: whether more than one call may come;
    others are left out if not.  grammar: what answers are held to, in Lark; None where they are free, or held to what the
    request says itself.
    """

    marks: Marks | None = None
    inside: bool = False
    parser: type[Machine] | None = None
    tools: Tools | None = None
    parallel: bool = True
    grammar: str | None = None

    def open(self) -> Speech:
        """A reader for one answer."""
        return Speech(self)


class Speech:
    """Text of one answer in, what it says out.  The work is linear in the text, the result the same however it is cut."""

    def __init__(self, manner: Manner) -> None:
        self._reasoning = None if manner.marks is None else Reasoning(manner.marks, inside=manner.inside)
        self._parser = None if manner.parser is None else manner.parser(manner.tools)
        self._parallel = manner.parallel

    @property
    def thought_chars(self) -> int:
        """Length of the text up to and with the end of the thought."""
        return 0 if self._reasoning is None else self._reasoning.end

    def push(self, text: str) -> list[Said]:
        thought, answer = ("", text) if self._reasoning is None else self._reasoning.push(text)
        said: list[Said] = [Thought(thought)] if thought else []
        return said + self._parsed(answer) if answer else said

    def finish(self) -> list[Said]:
        """What was held back: the answer has ended."""
        thought, answer = ("", "") if self._reasoning is None else self._reasoning.finish()
        said: list[Said] = [Thought(thought)] if thought else []
        said += self._parsed(answer) if answer else []
        return said + (self._kept(self._parser.finish()) if self._parser else [])

    def _parsed(self, text: str) -> list[Said]:
        return [Text(text)] if self._parser is None else self._kept(self._parser.feed(text))

    def _kept(self, events: Iterable[Event]) -> list[Said]:
        """Events without the calls that may not come."""
        kept: list[Said] = []
        for event in events:
            if self._parallel or isinstance(event, Text) or event.index == 0:
                kept.append(event)
            elif isinstance(event, Broken):
                kept.append(Text(event.text))
        return kept


__all__ = ["Arguments", "Begun", "Broken", "Ended", "Manner", "Said", "Speech", "Text", "Thought"]
