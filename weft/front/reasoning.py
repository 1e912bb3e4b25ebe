"""What a model thinks before it answers, told apart from the answer: `<think>...</think>` and how other families write it.

A thought stands at the beginning of an output, or its beginning stands at the end of the prompt, where templates open it.
Marks anywhere else are text.  White space at the borders of the thought belongs to the form and is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from weft.errors import ConfigError
from weft.front.detokenize import automaton
from weft.front.tools.value import SPACE


@dataclass(frozen=True, slots=True)
class Marks:
    """How a family writes a thought."""

    name: str
    begin: str
    end: str

    def opened(self, prompt: str) -> bool:
        """Whether a prompt ends inside a thought that it has opened."""
        return prompt.rstrip(SPACE).endswith(self.begin)


MARKS: dict[str, Marks] = {
    m.name: m
    for m in (
        Marks("think", "<think>", "</think>"),
        Marks("mistral", "[THINK]", "[/THINK]"),
        Marks("seed_oss", "<seed:think>", "</seed:think>"),
        Marks("cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
        Marks("thinking", "<thinking>", "</thinking>"),
        Marks("gemma", "<|channel>thought", "<channel|>"),
    )
}


def told(source: str) -> Marks | None:
    """The marks that a chat template writes or looks for; None where it has none."""
    for marks in MARKS.values():
        if marks.end in source and (marks.begin in source or marks.name == "think"):
            return marks
    return None


def chosen(name: str, sources: Iterable[str]) -> Marks | None:
    """The marks of a name; "auto": those that the first telling template has; "none": none.  Raises ConfigError."""
    if name == "none":
        return None
    if name == "auto":
        return next(filter(None, map(told, sources)), None)
    if name not in MARKS:
        raise ConfigError(f"there is no reasoning parser {name!r}; there are auto, none, {', '.join(sorted(MARKS))}")
    return MARKS[name]


class Reasoning:
    """Text of one output in, however it is cut; (thought, answer) out, whose pieces concatenate to both.

    inside: the prompt has opened the thought.  end: length of the text up to and with the end of the thought; 0 where there is
    none, and growing with the text while it goes on.  Linear in the text.
    """

    def __init__(self, marks: Marks, *, inside: bool = False) -> None:
        self._begin, self._close = marks.begin, automaton((marks.end,))
        self._state = "thought" if inside else "before"
        self._lead = True  # white space at the head of the thought, or of the answer behind it, is dropped
        self._before: list[str] = []
        self._matched = 0
        self._node = 0
        self._held = ""
        self._space: list[str] = []
        self._read = 0
        self._ended_at = 0

    @property
    def end(self) -> int:
        return self._read if self._state == "thought" else self._ended_at

    def push(self, text: str) -> tuple[str, str]:
        thought: list[str] = []
        for i, char in enumerate(text):
            self._read += 1
            if self._state == "before":
                opened = self._look(char)
                if opened is not None:
                    self._read += len(text) - i - 1
                    return "".join(thought), opened + text[i + 1 :]
            elif self._state == "thought":
                self._think(char, thought)
            elif not self._lead or char not in SPACE:
                self._lead = False
                self._read += len(text) - i - 1
                return "".join(thought), text[i:]
        return "".join(thought), ""

    def _look(self, char: str) -> str | None:
        """One character before anything is known: the text so far, once it is no thought."""
        self._before.append(char)
        if not self._matched and char in SPACE:
            return None
        if char == self._begin[self._matched]:
            self._matched += 1
            if self._matched == len(self._begin):
                self._state = "thought"
                self._before.clear()
            return None
        self._state, self._lead = "answer", False
        return "".join(self._before)

    def _think(self, char: str, thought: list[str]) -> None:
        self._node = self._close.step(self._node, char)
        self._held += char
        if self._close.hit[self._node]:
            self._state, self._lead, self._held, self._ended_at = "answer", True, "", self._read
            self._space.clear()
            return
        cut = len(self._held) - self._close.depth[self._node]
        self._keep(self._held[:cut], thought)
        self._held = self._held[cut:]

    def _keep(self, text: str, thought: list[str]) -> None:
        for char in text:
            if char in SPACE:
                if not self._lead:
                    self._space.append(char)
            else:
                self._lead = False
                thought += self._space
                thought.append(char)
                self._space.clear()

    def finish(self) -> tuple[str, str]:
        """What was held back: the output has ended."""
        if self._state == "before":
            return "", "".join(self._before)
        thought: list[str] = []
        self._keep(self._held, thought)
        return "".join(thought), ""
