"""Tokenizers that come without `tokenizer.json`: built from the files that older checkpoints have.

    tokenizer.model (SentencePiece, BPE)           Llama 1 and 2, Mistral, Gemma
    tokenizer.model (tiktoken ranks)               Llama 3
    {r50k,cl100k,o200k}_base.tiktoken              OpenAI's public encodings
    vocab.json + merges.txt (encoder.json + vocab.bpe)   GPT-2 and its kin, Qwen2

Sources: SentencePiece's `sentencepiece_model.proto` (Apache-2.0), tiktoken's rank files and patterns, `GPT2Tokenizer`
and `Qwen2Tokenizer` of transformers for the pre-tokenizing patterns.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from weft.errors import ConfigError
from weft.front.decoding import CHAR_OF_BYTE
from weft.front.files import read_bytes, read_text
from weft.front.sentencepiece import sentencepiece_bpe

Converted = tuple[Backend, dict[str, Any]]
"""A backend, and what tokenizer_config.json would have said (its own words win over these)."""

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CL100K = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
O200K = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_ENGLISH}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_ENGLISH}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_LLAMA3_RANKS = 128_000
_LLAMA3_NAMES = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}
_PUBLIC: dict[str, tuple[str | None, dict[str, int]]] = {
    "r50k_base": (None, {"<|endoftext|>": 50256}),
    "cl100k_base": (
        CL100K,
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": (O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}
_GPT2_CLASSES = ("", "GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "CodeGenTokenizerFast")
_QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")


def convert(folder: Path, config: dict[str, Any]) -> Converted:
    """A backend from whatever tokenizer files `folder` has.  ConfigError names the file that is needed instead."""
    model = folder / "tokenizer.model"
    if model.is_file():
        data = read_bytes(model)
        if _looks_like_ranks(data):
            return _llama3(model, data, config)
        return sentencepiece_bpe(model, data, config)
    for stem, (pattern, special) in _PUBLIC.items():
        path = folder / f"{stem}.tiktoken"
        if path.is_file():
            return bpe_from_ranks(_ranks(path, read_bytes(path)), pattern, special), {}
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab).is_file() and (folder / merges).is_file():
            return _vocab_and_merges(folder / vocab, folder / merges, config)
    raise ConfigError(
        f"{folder} has no tokenizer: tokenizer.json is needed (or tokenizer.model, or vocab.json with merges.txt)"
    )


# ---------------------------------------------------------------------------------------------- tiktoken ranks


def _looks_like_ranks(data: bytes) -> bool:
    """A rank file is lines of base64, a space and a number; a SentencePiece model starts with a protobuf tag."""
    head = data[:256].split(b"\n", 1)[0].split(b" ")
    return len(head) == 2 and head[1].strip().isdigit() and not data.startswith(b"\x0a")


def _ranks(path: Path, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        for line in data.splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as e:
        raise ConfigError(f"{path}: line {len(ranks) + 1} is not 'base64 rank'; fetch the file again") from e
    if len(ranks) < 256 or any(bytes([b]) not in ranks for b in range(256)):
        raise ConfigError(f"{path}: the ranks do not cover all 256 bytes; the file may be cut short, fetch it again")
    return ranks


def bpe_from_ranks(ranks: dict[bytes, int], pattern: str | None, special: dict[str, int]) -> Backend:
    """Byte-level BPE that merges as tiktoken does: at each point the pair whose joined bytes have the lowest rank.

    tiktoken knows no merge list, only the rank of each result, so each way of splitting a token into two tokens becomes
    a merge.  pattern: None is GPT-2's.  special: ids of special tokens, with gaps where the encoding has them.
    """
    spell = {token: "".join(CHAR_OF_BYTE[b] for b in token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(a, b) for a, b in splits if a in ranks and b in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spell[a], spell[b]) for a, b in known]
    vocab = {spell[token]: rank for token, rank in ranks.items()} | special
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    _byte_level(backend, pattern)
    return backend


def _byte_level(backend: Backend, pattern: str | None, *, prefix_space: bool = False) -> None:
    """Pre-tokenizer and decoder of byte-level BPE.  pattern: what splits text into words; None is GPT-2's."""
    if pattern is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=True)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()


def _llama3(path: Path, data: bytes, config: dict[str, Any]) -> Converted:
    ranks = _ranks(path, data)
    if len(ranks) != _LLAMA3_RANKS:
        raise ConfigError(
            f"{path} holds {len(ranks)} tiktoken ranks, and weft knows only Llama 3's {_LLAMA3_RANKS}; "
            "put the checkpoint's tokenizer.json beside it"
        )
    special = _llama3_special(config.get("added_tokens_decoder") or {})
    defaults = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "add_bos_token": True}
    return bpe_from_ranks(ranks, CL100K, special), defaults


def _llama3_special(listed: dict[str, Any]) -> dict[str, int]:
    """Llama 3.1's names of the 256 ids behind the ranks; those that the checkpoint lists itself go before them."""
    own = {int(i): entry["content"] for i, entry in listed.items() if i.isdecimal() and isinstance(entry, dict)}
    taken = set(own.values())
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(256))
    special: dict[str, int] = {}
    for offset in range(256):
        i = _LLAMA3_RANKS + offset
        name = f"<|{_LLAMA3_NAMES[offset]}|>" if offset in _LLAMA3_NAMES else next(reserved)
        special[own.get(i) or (name if name not in taken else f"<|unused_{i}|>")] = i
    return special


# ---------------------------------------------------------------------------------------------- vocab and merges


def _pair(line: str) -> tuple[str, str]:
    left, right = line.rstrip("\r").split(" ")
    return left, right


def _vocab_and_merges(vocab_path: Path, merges_path: Path, config: dict[str, Any]) -> Converted:
    kind = str(config.get("tokenizer_class") or "")
    if kind not in (*_GPT2_CLASSES, *_QWEN2_CLASSES):
        raise ConfigError(
            f"{vocab_path.parent}: how {kind} splits text is not known from vocab.json and merges.txt; "
            "put the checkpoint's tokenizer.json beside them"
        )
    try:
        vocab = json.loads(read_text(vocab_path))
        lines = read_text(merges_path).split("\n")
        merges = [_pair(line) for line in lines if line.strip() and not line.startswith("#version")]
        backend = Backend(models.BPE(vocab=vocab, merges=merges))
    except ConfigError:
        raise
    except Exception as e:  # the library raises plain Exception for a merge that the vocabulary lacks
        raise ConfigError(f"{vocab_path} and {merges_path.name} cannot be used ({e}); fetch them again") from e
    qwen = kind in _QWEN2_CLASSES
    if qwen:
        backend.normalizer = normalizers.NFC()
    _byte_level(backend, QWEN2 if qwen else None, prefix_space=bool(config.get("add_prefix_space")))
    defaults: dict[str, Any] = {}
    if "<|endoftext|>" in vocab:
        backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
        defaults = {"eos_token": "<|endoftext|>"} | ({} if qwen else {"bos_token": "<|endoftext|>"})
    return backend, defaults
