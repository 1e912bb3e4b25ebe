"""Slot `constrain`: what a technique answers that holds outputs to a grammar, and what it is told of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from weft.types import Grammar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What token ids stand for.

    tokens: the bytes of each id inside a text, b"" where it has none; as many as rows of logits.  special: ids that are no text.
    ends: ids of which each ends an output.  encode: ids of a text as it is commonly written, whose bytes are exactly the text's.
    """

    tokens: Sequence[bytes]
    special: frozenset[int]
    ends: tuple[int, ...]
    encode: Callable[[str], Sequence[int]]


class Words(Protocol):
    """The vocabulary of an engine's model, read when it is first asked for.

    of    what the tokens of another model stand for, named as in the slot `draft`
    once  what `make` makes of it, made once for each key, whoever asks (threads too), and kept while it is among the newest

    Raises ConfigError where the model has no tokenizer, or no token that ends an output.
    """

    @property
    def vocabulary(self) -> Vocabulary: ...
    def of(self, model: str) -> Vocabulary: ...
    def once(self, key: str, make: Callable[[Vocabulary], T], size: int = 0) -> T: ...


class GrammarPath(Protocol):
    """How far one text has come in a grammar; behind an end nothing but ends may stand.  Each may raise RequestError where the
    grammar is too complex to go on.

    mask      which ids may follow, a bit for each, the lowest first; at least one
    advance   take in the first of these tokens, as many as the grammar allows, and say how many
    rollback  forget the last tokens
    fork      another path that stands in the same place

    ends: ids that end the text where the grammar lets it end.
    """

    @property
    def ends(self) -> frozenset[int]: ...
    def mask(self) -> bytes: ...
    def advance(self, tokens: Sequence[int]) -> int: ...
    def rollback(self, count: int) -> None: ...
    def fork(self) -> GrammarPath: ...


class Constrain(Protocol):
    """Slot `constrain`: which tokens a request's grammar allows.

    attach  take hold of the engine's vocabulary; called once, before any request has the instance
    check   whether a grammar can be held to, without a vocabulary: called in a process that may be ended when it takes too long.
            Raises RequestError saying what in it is not possible, and never leaves a part of it out
    begin   a path at the beginning of a grammar, which is made ready the first time, off the step thread where there is one
    """

    def attach(self, words: Words) -> None: ...
    def check(self, grammar: Grammar) -> None: ...
    def begin(self, grammar: Grammar) -> GrammarPath: ...
