"""Turning a tokenizer's decoder into a stream: the same text as decoding all tokens at once, but piece by piece.

A `tokenizers` decoder is a list of steps, each mapping a list of strings to a list of strings; the text is the
concatenation of the last list.  Almost every step looks at one string at a time or needs a bounded wait, so each has a
streaming twin here that keeps the little state it needs.  A step without a twin makes the whole decoder wait for the
end: slow to show, never wrong.

Semantics follow huggingface/tokenizers 0.22, `tokenizers/src/decoders` and `pre_tokenizers/{byte_level,metaspace}.rs`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tokenizers.decoders import Decoder


class NoTwin(Exception):
    """A decoder step that cannot be streamed."""


class Stage(Protocol):
    """One streaming step: pieces in, pieces out; `end` gives what was held back."""

    def feed(self, pieces: list[str]) -> list[str]: ...

    def end(self) -> list[str]: ...


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, as character -> byte (Radford et al. 2019, `bytes_to_unicode`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in plain}
    others = (b for b in range(256) if b not in set(plain))
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table


BYTE_OF_CHAR = byte_alphabet()
CHAR_OF_BYTE = {b: c for c, b in BYTE_OF_CHAR.items()}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level BPE token.  A token with any character outside the alphabet stands for its own UTF-8."""
    try:
        return bytes([BYTE_OF_CHAR[c] for c in token])
    except KeyError:
        return token.encode("utf-8", "replace")


def fallback_byte(token: str) -> int | None:
    """The byte that a SentencePiece byte token such as `<0x0A>` stands for, or None."""
    match = _BYTE_TOKEN.fullmatch(token)
    return int(match[1], 16) if match else None


@dataclass(slots=True)
class Utf8:
    """Pieces are bytes written as Latin-1; gives text as soon as characters are complete, U+FFFD for broken ones."""

    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )

    def feed(self, pieces: list[str]) -> list[str]:
        return [self.decoder.decode("".join(pieces).encode("latin-1"))]

    def end(self) -> list[str]:
        return [self.decoder.decode(b"", final=True)]


@dataclass(slots=True)
class ByteFallback:
    """Joins runs of byte tokens.  A run that is not UTF-8 as a whole gives one U+FFFD for each of its bytes.

    So nothing of a run can be shown before its end: a bad byte spoils good characters that came before it.
    """

    run: bytearray = field(default_factory=bytearray)

    def feed(self, pieces: list[str]) -> list[str]:
        out: list[str] = []
        for piece in pieces:
            byte = fallback_byte(piece)
            if byte is not None:
                self.run.append(byte)
                continue
            if self.run:
                out += self.end()
            out.append(piece)
        return out

    def end(self) -> list[str]:
        run, self.run = bytes(self.run), bytearray()
        try:
            return [run.decode("utf-8")] if run else []
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


@dataclass(slots=True)
class Metaspace:
    """SentencePiece's visible space back to a space; the first piece loses it where encoding had added one."""

    replacement: str
    drops_first: bool
    first: bool = True

    def feed(self, pieces: list[str]) -> list[str]:
        if not pieces:
            return pieces
        out = [p.replace(self.replacement, " ") for p in pieces]
        if self.first:
            self.first = False
            if self.drops_first:
                out[0] = pieces[0].replace(self.replacement, "")
        return out

    def end(self) -> list[str]:
        return []


@dataclass(slots=True)
class StripText:
    """Takes up to `start` characters `content` off the head of the whole text, and up to `stop` off its tail."""

    content: str
    start: int
    stop: int
    held: str = ""

    def feed(self, pieces: list[str]) -> list[str]:
        text = self.held + "".join(pieces)
        self.held = ""
        while self.start and text:
            if not text.startswith(self.content):
                self.start = 0
                break
            text = text[1:]
            self.start -= 1
        if self.stop and text:
            tail = text[-self.stop :]
            keep = len(tail) - len(tail.rstrip(self.content))
            text, self.held = text[: len(text) - keep], text[len(text) - keep :]
        return [text]

    def end(self) -> list[str]:
        return []


@dataclass(slots=True)
class Spaced:
    """No decoder at all: tokens with a space between them."""

    first: bool = True

    def feed(self, pieces: list[str]) -> list[str]:
        out = [p if self.first and not i else " " + p for i, p in enumerate(pieces)]
        self.first = self.first and not pieces
        return out

    def end(self) -> list[str]:
        return []


@dataclass(slots=True)
class Whole:
    """A decoder without a streaming twin: everything waits for the end."""

    decoder: Decoder
    tokens: list[str] = field(default_factory=list)

    def feed(self, pieces: list[str]) -> list[str]:
        self.tokens += pieces
        return []

    def end(self) -> list[str]:
        tokens, self.tokens = self.tokens, []
        return [self.decoder.decode(tokens)]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """A decoder, ready to be streamed: `first` maps one token on its own (so it can be cached), `stages` do the rest.

    byte_level, byte_fallback: how tokens spell bytes.  streams: False where text only comes at the end.
    """

    first: tuple[Callable[[str], str], ...]
    stages: tuple[Callable[[], Stage], ...]
    byte_level: bool = False
    byte_fallback: bool = False
    streams: bool = True

    def piece(self, token: str) -> str:
        for step in self.first:
            token = step(token)
        return token

    def open(self) -> list[Stage]:
        """Fresh state for one sequence."""
        return [make() for make in self.stages]

    def token_bytes(self, token: str) -> bytes:
        """Exact bytes that one token stands for inside a text."""
        if self.byte_level:
            return byte_level_bytes(token)
        byte = fallback_byte(token) if self.byte_fallback else None
        return bytes([byte]) if byte is not None else token.replace("\u2581", " ").encode("utf-8", "replace")


def plan_decoder(decoder: Decoder | None) -> DecodePlan:
    """The streaming form of a `tokenizers` decoder."""
    if decoder is None:
        return DecodePlan((), (Spaced,))
    state = json.loads(decoder.__getstate__())
    steps = _flatten(state)
    kinds = [s["type"] for s in steps]
    byte_level, byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
    try:
        first, stages = _compile(steps)
    except NoTwin:
        return DecodePlan((), (lambda: Whole(decoder),), byte_level, byte_fallback, streams=False)
    return DecodePlan(tuple(first), tuple(stages), byte_level, byte_fallback)


def _flatten(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    return [step for part in state["decoders"] for step in _flatten(part)]


def _compile(steps: Sequence[dict[str, Any]]) -> tuple[list[Callable[[str], str]], list[Callable[[], Stage]]]:
    """Per-token functions, then stages.  NoTwin where a step needs more than its twin can do."""
    first: list[Callable[[str], str]] = []
    stages: list[Callable[[], Stage]] = []
    fused = False

    def each(step: Callable[[str], str]) -> None:
        if stages:
            stages.append(lambda: Each(step))
        else:
            first.append(step)

    for step in steps:
        kind = step["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "ByteLevel" and not fused:
            each(lambda token: byte_level_bytes(token).decode("latin-1"))
            stages.append(Utf8)
            fused = True
        elif kind == "ByteFallback" and not fused:
            stages.append(ByteFallback)
        elif kind == "Metaspace" and not fused:
            mark, drops = step["replacement"], step.get("prepend_scheme", "always") != "never"
            stages.append(lambda mark=mark, drops=drops: Metaspace(mark, drops))  # type: ignore[misc]
        elif kind == "Replace" and "String" in step["pattern"] and (not fused or len(step["pattern"]["String"]) == 1):
            old, new = step["pattern"]["String"], step["content"]
            each(lambda token, old=old, new=new: token.replace(old, new))  # type: ignore[misc]
        elif kind == "Strip" and fused and len(step["content"]) == 1:
            args = (step["content"], step["start"], step["stop"])
            stages.append(lambda args=args: StripText(*args))  # type: ignore[misc]
        elif kind == "Strip" and not fused:
            args = (step["content"], step["start"], step["stop"])
            each(lambda token, args=args: _strip(token, *args))  # type: ignore[misc]
        else:
            raise NoTwin(kind)
    return first, stages


@dataclass(slots=True)
class Each:
    """A step that looks at one piece at a time."""

    step: Callable[[str], str]

    def feed(self, pieces: list[str]) -> list[str]:
        return [self.step(p) for p in pieces]

    def end(self) -> list[str]:
        return []


def _strip(token: str, content: str, start: int, stop: int) -> str:
    strip = StripText(content, start, stop)
    return "".join(strip.feed([token]))
