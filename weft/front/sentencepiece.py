"""SentencePiece BPE models (`tokenizer.model` of Llama 1 and 2, Mistral, Gemma) as a `tokenizers` backend.

The file is a protobuf message; only the few fields that matter are read, by a reader of the wire format
(https://protobuf.dev/programming-guides/encoding) that trusts nothing in the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from weft.errors import ConfigError

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces; GGUF counts tokens' kinds the same way."""
UNIGRAM, BPE = 1, 2


@dataclass(slots=True)
class SentencePieceModel:
    """The fields of `ModelProto` that tokenizing depends on, with the message's own defaults."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    """(text, score, kind) by id."""
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message; fixed-width values come as bytes.  ValueError where it is broken."""
    at, end = 0, len(data)

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= end or shift > 63:
                raise ValueError("the message ends inside a number")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < end:
        tag = varint()
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5) or not number:
            raise ValueError(f"wire type {wire}")
        size = {1: 8, 5: 4}.get(wire) or (varint() if wire == 2 else 0)
        if at + size > end:
            raise ValueError("the message is shorter than it says")
        yield number, data[at : at + size]
        at += size


def _signed(value: int | bytes) -> int:
    """An int32 field: negative numbers are written as 64-bit two's complement."""
    number = int(value)
    return number - (1 << 64) if number >= 1 << 63 else number


def parse_model(data: bytes) -> SentencePieceModel:
    """Read a serialized `ModelProto`.  ValueError where it is not one."""
    model = SentencePieceModel()
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text, score, kind = "", 0.0, NORMAL
            for n, v in _fields(value):
                if n == 1 and isinstance(v, bytes):
                    text = v.decode("utf-8")
                elif n == 2 and isinstance(v, bytes):
                    score = struct.unpack("<f", v)[0]
                elif n == 3:
                    kind = _signed(v)
            model.pieces.append((text, score, kind))
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value))
            model.model_type = _signed(trainer.get(3, UNIGRAM))
            model.byte_fallback = bool(trainer.get(35, 0))
            model.unk_id = _signed(trainer.get(40, 0))
            model.bos_id = _signed(trainer.get(41, 1))
            model.eos_id = _signed(trainer.get(42, 2))
            model.pad_id = _signed(trainer.get(43, (1 << 64) - 1))
        elif number == 3 and isinstance(value, bytes):
            spec = dict(_fields(value))
            charsmap = spec.get(2, b"")
            model.charsmap = charsmap if isinstance(charsmap, bytes) else b""
            model.add_dummy_prefix = bool(spec.get(3, 1))
            model.remove_extra_whitespaces = bool(spec.get(4, 1))
            model.escape_whitespaces = bool(spec.get(5, 1))
    if not model.pieces:
        raise ValueError("it holds no pieces")
    return model


def sentencepiece_bpe(path: Path, data: bytes, config: dict[str, Any]) -> tuple[Backend, dict[str, Any]]:
    """A backend that encodes as SentencePiece does, and defaults for tokenizer_config.json.

    `legacy: false` in the configuration puts the dummy space only before the first text, as transformers does.
    ConfigError for a broken file, and for Unigram models (they need a tokenizer.json).
    """
    try:
        model = parse_model(data)
    except (ValueError, TypeError, struct.error) as e:
        raise ConfigError(f"{path} is not a SentencePiece model ({e}); fetch it again") from e
    if model.model_type != BPE:
        raise ConfigError(f"{path} is not a BPE model; put the checkpoint's tokenizer.json beside it")
    return backend_of(path, model, first_only=config.get("legacy") is False)


def backend_of(path: Path, model: SentencePieceModel, *, first_only: bool = False) -> tuple[Backend, dict[str, Any]]:
    """The same from a model's fields.  path: the file that errors name."""
    vocab = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    if len(vocab) != len(model.pieces):
        raise ConfigError(f"{path} lists a piece twice; fetch it again")
    unknown = model.pieces[model.unk_id][0] if 0 <= model.unk_id < len(model.pieces) else None
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=_merges(model, vocab),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    _text_steps(backend, model, first_only=first_only)
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, _, k in model.pieces if k in (CONTROL, UNKNOWN)]
    )
    own = [text for text, _, kind in model.pieces if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(text, special=False, normalized=True) for text in own])
    defaults: dict[str, Any] = {"add_bos_token": True}
    for name in ("bos", "eos", "unk", "pad"):
        i = getattr(model, f"{name}_id")
        if 0 <= i < len(model.pieces):
            defaults[f"{name}_token"] = model.pieces[i][0]
    return backend, defaults


def _merges(model: SentencePieceModel, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Each split of each piece, best scores first, as SentencePiece joins the neighbours that score best together."""
    joins = [(text, score) for text, score, kind in model.pieces if kind in (NORMAL, USER_DEFINED)]
    joins.sort(key=lambda join: -join[1])
    merges: list[tuple[str, str]] = []
    for text, _ in joins:
        splits = [(text[:i], text[i:]) for i in range(1, len(text))]
        known = [(a, b) for a, b in splits if a in vocab and b in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += known
    return merges


def _text_steps(backend: Backend, model: SentencePieceModel, *, first_only: bool) -> None:
    """Normalizer, pre-tokenizer and decoder."""
    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    spaced = model.add_dummy_prefix and not first_only
    if spaced:
        steps.append(normalizers.Prepend(SPACE))
    if model.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    if model.add_dummy_prefix and first_only:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    back: list[Any] = [decoders.Replace(SPACE, " ")] if model.escape_whitespaces else []
    if model.byte_fallback:
        back.append(decoders.ByteFallback())
    back.append(decoders.Fuse())
    if model.add_dummy_prefix:
        back.append(decoders.Strip(content=" ", left=1, right=0))
    backend.decoder = decoders.Sequence(back)
