"""llguidance: a token is drawn only where the grammar can go on with it.

Paper    the library llguidance (Microsoft, github.com/guidance-ai/llguidance), which walks a trie of the vocabulary with
         derivatives of regular expressions (Brzozowski, 1964) under an Earley parser (Earley, 1970)
Rule     logit(t) = -inf for each id t for which no text of the grammar begins with the output so far followed by t's bytes; an
         end id is allowed where the output so far is a text of the grammar.  Where all texts go on with the same bytes, the one
         token by which the tokenizer writes them is allowed
Shapes   mask: a bit for each of vocab ids
Units    masks: rows of logits; tokens: taken into grammars; grammars: made ready
Cost     a mask for each sampled row on one thread of the CPU, and the grammar's parser for each live sequence.  A grammar is made
         ready once, off the step thread, and kept
Pays     where an answer is read by a program: every answer that ends is one of the grammar.  It costs time, never saves any:
         0.1 ms in the median for a row of 151,936 logits, and a few milliseconds where the parser meets something new
Differs  nothing is drawn ahead where only one text can follow (the library's forced tokens): such tokens take a step each, and
         a draft guesses them.  White space between the tokens of JSON is at most `whitespace` characters long, as models that
         are free to write it may write nothing else.  Rows of the parser have at most `items` items, fewer than the library
         allows, so that the time of a step is bounded; a grammar that needs more is refused, or ends its request.
         Log-probabilities are reported of the masked law, as in vLLM.  Fidelity is meant against the masked law
Raises   ValueError for items or whitespace out of range; RequestError naming what in a grammar it can't hold an answer to
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from weft.constrain._common import exact, unheld
from weft.errors import RequestError
from weft.registry import register
from weft.slots import Vocabulary, Words
from weft.traits import Effect, Traits
from weft.types import Grammar

MOST_TEXTS = 8192
"""Texts that must follow whose tokens are kept: names of members and the like, which come again and again."""
MOST_TEXT_CHARS = 256
"""Longer ones are not kept, so that what is kept is bounded in bytes."""
MOST_CHARS = 300
"""Of the library's own words that are told to a client."""
BYTES = Vocabulary((*(bytes([i]) for i in range(256)), b""), frozenset({256}), (256,), lambda text: list(text.encode()))
"""A vocabulary in which every text can be written: what a grammar means does not depend on the model's."""


@register("constrain", "llguidance")
@dataclass(slots=True, kw_only=True)
class LLGuidance:
    """items: of a row of the parser, at most.  whitespace: characters of it between two tokens of JSON, at most."""

    items: int = 500
    whitespace: int = 1
    acts: dict[str, int] = field(
        default_factory=lambda: {"masks": 0, "tokens": 0, "grammars": 0}, init=False, compare=False
    )
    per_request: ClassVar[bool] = True
    neutral: ClassVar[None] = None
    grammars: ClassVar[tuple[Grammar, ...]] = (
        Grammar("regex", "[A-Za-z ,.]*"),
        Grammar("json", '{"type": "array", "items": {"enum": ["boat", "bell", 11, null]}, "minItems": 1}'),
        Grammar("grammar", 'start: (WORD " ")+\nWORD: /[a-z]{1,9}/'),
    )
    traits: ClassVar[Traits] = Traits(effects=frozenset({Effect.REDEFINES}))
    _words: Words | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (1 <= self.items <= 2000 and 0 <= self.whitespace <= 1000):
            raise ValueError(
                f"items from 1 to 2000 and whitespace from 0 to 1000 are needed, got {self.items}, {self.whitespace}"
            )

    def attach(self, words: Words) -> None:
        self._words = words

    def check(self, grammar: Grammar) -> None:
        matcher = self._matcher(_tokenizer(BYTES), grammar)
        matcher.compute_bitmask()
        _fail(matcher, grammar)

    def begin(self, grammar: Grammar) -> Path:
        words = self._words
        assert words is not None, "a technique is attached before a request has it"
        said = f"{self.items} {self.whitespace} {grammar.kind} {grammar.source}"
        key = hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()
        size = len(grammar.source)
        ready = words.once(f"llguidance {key}", lambda _: self._ready(words, grammar), size)
        vocabulary = words.vocabulary
        return Path(self.acts, grammar, ready.deep_copy(), frozenset(vocabulary.ends), len(vocabulary.tokens))

    def _ready(self, words: Words, grammar: Grammar) -> Any:
        matcher = self._matcher(words.once("llguidance", _tokenizer), grammar)
        _fail(matcher, grammar)
        self.acts["grammars"] += 1
        return matcher

    def _matcher(self, tokenizer: Any, grammar: Grammar) -> Any:
        """The library's matcher at the beginning of a grammar, in an error state where it is none."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_items_in_row=self.items, verbose_errors=False)
        return LLMatcher(tokenizer, self._written(grammar), log_level=0, limits=limits)

    def _written(self, grammar: Grammar) -> str:
        """The grammar as the library reads it.  Raises RequestError."""
        from llguidance import LLMatcher, grammar_from

        if grammar.kind == "regex":
            if (len(grammar.source) - len(grammar.source.rstrip("\\"))) % 2:
                raise _refused(grammar, "it ends with a backslash that stands before nothing")
            return str(LLMatcher.grammar_from_regex(grammar.source))
        if grammar.kind != "json":
            try:
                return str(grammar_from(grammar.kind, grammar.source))
            except (ValueError, RecursionError) as error:
                raise _refused(grammar, str(error)) from None
        options: Any = {"whitespace_flexible": self.whitespace > 0, "lenient": False, "coerce_one_of": False}
        if self.whitespace:
            options["whitespace_pattern"] = rf"[\x20\x0A\x0D\x09]{{1,{self.whitespace}}}"
        try:
            schema = json.loads(grammar.source)
            found = unheld(schema)
            if found is not None:
                raise _refused(grammar, f"format {found[0]}: {found[1]}")
            return str(LLMatcher.grammar_from_json_schema(json.dumps(exact(schema)), overrides=options))
        except (ValueError, RecursionError) as error:
            raise _refused(grammar, str(error)) from None


@dataclass(slots=True)
class Path:
    """One text's place in a grammar.  size: of the vocabulary.  over: end tokens that were taken in; behind the first one nothing
    but more of them may stand."""

    acts: dict[str, int]
    grammar: Grammar
    matcher: Any
    ends: frozenset[int]
    size: int
    over: int = 0

    def mask(self) -> bytes:
        self.acts["masks"] += 1
        if self.over:
            return sum(1 << i for i in self.ends).to_bytes(-(-self.size // 8), "little")
        bits: bytes = self.matcher.compute_bitmask()
        _fail(self.matcher, self.grammar)
        return bits

    def advance(self, tokens: Sequence[int]) -> int:
        text = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        taken = 0
        if text and not self.over:
            taken = int(self.matcher.try_consume_tokens([*tokens[:text]]))
            _fail(self.matcher, self.grammar)
        if taken == text:
            for token in tokens[text:]:
                if token not in self.ends or not (self.over or self.matcher.is_accepting()):
                    break
                self.over += 1
                taken += 1
        self.acts["tokens"] += taken
        return taken

    def rollback(self, count: int) -> None:
        ends = min(count, self.over)
        self.over -= ends
        if count > ends:
            self.matcher.rollback(count - ends)

    def fork(self) -> Path:
        return Path(self.acts, self.grammar, self.matcher.deep_copy(), self.ends, self.size, self.over)


def _tokenizer(vocabulary: Vocabulary) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Spelling(vocabulary)), eos_token=list(vocabulary.ends))


class _Spelling:
    """A vocabulary as the library asks for it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.ends[0]
        self.bos_token_id = None
        self.tokens = [*vocabulary.tokens]
        self.special_token_ids = sorted(vocabulary.special)
        self._encode = lru_cache(MOST_TEXTS)(lambda text: [*vocabulary.encode(text)])

    def __call__(self, text: bytes) -> list[int]:
        encode = self._encode if len(text) <= MOST_TEXT_CHARS else self._encode.__wrapped__
        return encode(text.decode())


def _fail(matcher: Any, grammar: Grammar) -> None:
    """Raise RequestError where the matcher cannot go on."""
    if matcher.is_error():
        raise _refused(grammar, matcher.get_error())


NAMES = {"json": "the JSON schema", "regex": "the regular expression", "choice": "the choice", "grammar": "the grammar"}


def _refused(grammar: Grammar, words: str) -> RequestError:
    """What is wrong with a grammar, from the library's words."""
    what = NAMES[grammar.kind]
    unread = re.search(r"Unimplemented keys: (\[.*?\])", words)
    if unread:
        keys = ", ".join(json.loads(unread[1]))
        text = f"{what} has keywords that an answer can't be held to: {keys}; leave them out, or say the same in others"
    elif re.search(r"max is \d+|TooComplex|too (complex|many|big|large)|\bfuel\b|\blimit\b", words):
        text = f"{what} is too complex: {_short(words)}; make it smaller, or less ambiguous"
    else:
        text = f"{what} can't be used: {_short(words)}"
    return RequestError(text, param="structured_outputs", code="invalid_grammar")


def _short(words: str) -> str:
    line = " ".join(words.partition("<state>")[0].split())
    return line if len(line) <= MOST_CHARS else f"{line[:MOST_CHARS]}..."
