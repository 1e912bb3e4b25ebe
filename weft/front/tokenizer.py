"""`Tokenizer`: text to ids and back, read from a checkpoint's own files.

`tokenizer.json` is run by the `tokenizers` library as it stands; a checkpoint that only has a SentencePiece model,
GPT-2's `vocab.json` + `merges.txt` or Llama 3's tiktoken ranks is converted first (see `convert`).  What surrounds it
follows transformers 5 (`TokenizersBackend`): added and named special tokens of `tokenizer_config.json` and
`special_tokens_map.json`, and `add_bos_token` / `add_eos_token` over the file's own post-processor.

Departures from it: a sequence that already begins with BOS never gets another, and `clean_up_tokenization_spaces` is
not applied, because it deletes spaces that the model wrote (transformers ignores it for BPE as well).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from weft.errors import ConfigError, RequestError
from weft.front.decoding import plan_decoder
from weft.front.files import read_bytes, read_json
from weft.models.gguf.header import is_gguf

MAX_TEXT_CHARS = 16 << 20
"""Longest text that is tokenized at all, in characters."""

CACHED_WORDS = 2048
"""Words whose tokens the library remembers.  It gives up none for another, and one of 255 letters takes 8 kB."""

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer.  Safe to use from several threads; nothing changes after loading but caches.

    config          tokenizer_config.json, completed by special_tokens_map.json
    special_tokens  named special tokens that are set, as text: {"bos_token": "<s>", ...}; what chat templates see
    bos_id          id of BOS, or None
    eos_ids         ids of the tokenizer's own EOS: none or one (`ModelText.eos_ids` has the whole model's)
    special_ids     ids that `skip_special` leaves out of text
    vocab_size      1 + the largest id with a token; a model may have more rows than that
    plan, pieces    how tokens become text (`decoding.DecodePlan`), and its cache by id
    """

    def __init__(self, backend: Backend, config: dict[str, Any] | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        _bound(backend)
        self.config = dict(config or {})
        self.special_tokens = _named_tokens(self.config)
        _add_tokens(backend, self.config, self.special_tokens)
        self._backend = backend
        self._plain: Backend | None = None
        self._lock = threading.Lock()
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size = max([backend.get_vocab_size(with_added_tokens=True), *(i + 1 for i in added)])
        self._added = frozenset(added)
        self.bos_id = self._id("bos_token")
        eos = self._id("eos_token")
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        self.plan = plan_decoder(backend.decoder)
        self.pieces: dict[int, str] = {}
        self._before, self._after = self._surroundings()

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint's folder, or of a GGUF file.  ConfigError names the file that is missing or broken."""
        folder = Path(folder)
        if is_gguf(folder):
            from weft.front.gguf import tokenizer

            return cls(*tokenizer(folder))
        config = read_json(folder / "tokenizer_config.json")
        extra = read_json(folder / "special_tokens_map.json")
        config = {**{k: v for k, v in extra.items() if config.get(k) is None}, **_given(config)}
        path = folder / "tokenizer.json"
        if not path.is_file():
            from weft.front.convert import convert

            backend, defaults = convert(folder, config)
            return cls(backend, {**defaults, **config})
        try:
            backend = Backend.from_buffer(read_bytes(path))
        except (ConfigError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # the library raises plain Exception for faults of the file, and Rust may panic
            raise ConfigError(f"{path} cannot be used as a tokenizer ({e}); fetch it again") from e
        return cls(backend, config)

    # ------------------------------------------------------------------------------------------ text to ids

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of `text`.

        add_special: put the model's BOS (and what else its post-processor adds) around it, unless it is there already.
        parse_special: special tokens written in the text count as such; if False they are ordinary characters.
        Raises RequestError for text that is too long or not Unicode.
        """
        backend = self._backend if parse_special else self._without_special()
        ids = self._ids(backend, [text])[0]
        return self._surround(ids) if add_special else ids

    def encode_batch(self, texts: Sequence[str], *, add_special: bool = True) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        batch = self._ids(self._backend, texts)
        return [self._surround(ids) for ids in batch] if add_special else batch

    def _ids(self, backend: Backend, texts: Sequence[str]) -> list[list[int]]:
        """Bare ids.  By the library's batch call also for one text: unlike `encode` it leaves the GIL to other threads."""
        for text in texts:
            self._check(text)
        try:
            return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError as e:  # a lone surrogate has no UTF-8
            raise RequestError("the text holds an unpaired surrogate, which is not Unicode text; remove it") from e

    def _check(self, text: str) -> None:
        if not isinstance(text, str):
            raise RequestError(f"a prompt must be text, not {type(text).__name__}", param="prompt")
        if len(text) > MAX_TEXT_CHARS:
            raise RequestError(
                f"the text has {len(text)} characters; at most {MAX_TEXT_CHARS} are accepted", param="prompt"
            )

    def _surround(self, ids: list[int]) -> list[int]:
        before, after = self._before, self._after
        if before and ids[: len(before)] != before:
            ids = before + ids
        if after and ids[-len(after) :] != after:
            ids = ids + after
        return ids

    def _surroundings(self) -> tuple[list[int], list[int]]:
        """Ids that stand before and after every text."""
        if "add_bos_token" in self.config or "add_eos_token" in self.config:
            before = [self.bos_id] if self.config.get("add_bos_token") and self.bos_id is not None else []
            return before, list(self.eos_ids) if self.config.get("add_eos_token") else []
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []

    def _without_special(self) -> Backend:
        """A second backend that reads special tokens as characters: the switch of the library is not thread-safe."""
        with self._lock:
            if self._plain is None:
                plain = Backend.from_str(self._backend.to_str())
                _bound(plain)
                plain.encode_special_tokens = True
                self._plain = plain
            return self._plain

    # ------------------------------------------------------------------------------------------ ids to text

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; ids without a token add nothing.  For a growing sequence use `detokenize.Detokenizer`."""
        text: str = self._backend.decode([i for i in ids if 0 <= i < 1 << 32], skip_special_tokens=skip_special)
        return text

    def piece(self, token_id: int) -> str | None:
        """What a token gives to the first stage of `plan`, or None where the id has no token."""
        token = self.id_to_token(token_id)
        if token is None:
            return None
        return self.pieces.setdefault(token_id, self.plan.piece(token))

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (`Ġthe`, `▁the`, `<0x0A>`), or None."""
        token: str | None = self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        return token

    def token_to_id(self, token: str) -> int | None:
        """Id of a token as the vocabulary spells it, or None."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token stands for inside a text (so with its leading space); b"" without a token."""
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added and not self.plan.byte_level:
            return token.encode("utf-8", "replace")
        return self.plan.token_bytes(token)

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text; bytes that are no character on their own show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)


def _bound(backend: Backend) -> None:
    """Hold the model's memory of words to CACHED_WORDS; models of whole words have none."""
    resize = getattr(backend.model, "_resize_cache", None)
    if resize is not None:
        resize(CACHED_WORDS)


def _given(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if v is not None}


def _content(token: Any) -> str | None:
    """Text of a token that a configuration gives as a string or as {"content": ...}."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    names = {name: config.get(name) for name in NAMED_TOKENS}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        extra = config.get(key)
        if isinstance(extra, dict):
            names |= {name: token for name, token in extra.items() if name not in names}
    return {name: text for name, token in names.items() if (text := _content(token)) is not None}


def _added_token(entry: dict[str, Any]) -> AddedToken:
    flags = {k: bool(entry[k]) for k in ("lstrip", "rstrip", "single_word", "normalized", "special") if k in entry}
    return AddedToken(entry["content"], **flags)


def _add_tokens(backend: Backend, config: dict[str, Any], named: dict[str, str]) -> None:
    """Make the backend know what the configuration says of added and special tokens.

    Ids are those of `added_tokens_decoder`; a named token that the vocabulary lacks is not given an id (there is no row
    for it in the model).
    """
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise ConfigError("tokenizer_config.json: added_tokens_decoder must be an object of id: token")
    known = backend.get_added_tokens_decoder()
    try:
        entries = sorted((int(i), entry) for i, entry in listed.items())
        tokens = [(i, _added_token(entry)) for i, entry in entries]
    except (ValueError, TypeError, KeyError) as e:
        raise ConfigError("tokenizer_config.json: added_tokens_decoder must map ids to {content, special, ...}") from e
    for i, token in tokens:
        if i in known and _flags(known[i]) == _flags(token):
            continue
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        got = backend.token_to_id(token.content)
        if got != i:
            raise ConfigError(
                f"tokenizer_config.json gives {token.content!r} the id {i}, but the vocabulary gives it {got}; "
                "the tokenizer files do not belong together"
            )
    more = config.get("additional_special_tokens")
    extra = config.get("extra_special_tokens")
    names = [*named.values()]
    names += [t for x in (more, extra) if isinstance(x, list) for item in x if (t := _content(item)) is not None]
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for content in dict.fromkeys(names):
        if content not in special and backend.token_to_id(content) is not None:
            backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def _flags(token: AddedToken) -> tuple[object, ...]:
    """Everything that makes two added tokens the same (their own equality looks at the text only)."""
    return (token.content, token.lstrip, token.rstrip, token.single_word, token.normalized, token.special)
