"""`ModelText`: what of a checkpoint concerns text: tokenizer, chat template, end tokens, default sampling."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from weft.errors import ConfigError, RequestError
from weft.front.detokenize import SequenceText
from weft.front.files import read_json
from weft.front.reasoning import MARKS as THOUGHTS
from weft.front.template import ChatTemplate, plain_messages
from weft.front.tokenizer import Tokenizer
from weft.front.tools import PARSERS
from weft.models.gguf.header import is_gguf
from weft.sampling import SamplingParams
from weft.slots import Vocabulary
from weft.types import RequestSpec, TokenItem

MARKS = frozenset(text for parser in PARSERS.values() for text in parser.special) | frozenset(
    text for marks in THOUGHTS.values() for text in (marks.begin, marks.end)
)
_SHRINK = 4
"""Unicode normalization makes at most so many characters into one (NFC; Unicode Standard Annex 15)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelText:
    """The text side of one model.  Thread-safe; imports no torch.

    eos_ids        every id that ends a sequence: those of generation_config.json, of config.json and of the tokenizer
    vocab_size     rows of the model's embedding, so ids run from 0 to vocab_size - 1
    defaults       sampling by the names of `SamplingParams`, from generation_config.json; {} where it says nothing
    max_model_len  the context in tokens, prompt and answer together; None for no limit here
    name           what error texts call the model
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    eos_ids: tuple[int, ...]
    vocab_size: int
    defaults: Mapping[str, Any] = field(default_factory=dict)
    max_model_len: int | None = None
    name: str = "this model"

    @classmethod
    def load(cls, folder: str | Path, *, max_model_len: int | None = None, name: str | None = None) -> ModelText:
        """Read the text side of the checkpoint in `folder`, or in a GGUF file.  ConfigError names what is missing or wrong."""
        folder = Path(folder)
        called = name or "this model"
        tokenizer = Tokenizer.load(folder)
        config, generation = _described(folder)
        place = (lambda name: folder) if is_gguf(folder) else folder.joinpath
        inner = config.get("text_config")
        inner = inner if isinstance(inner, dict) else {}
        vocab = inner.get("vocab_size", config.get("vocab_size", tokenizer.vocab_size))
        if isinstance(vocab, bool) or not isinstance(vocab, int) or vocab < 1:
            raise ConfigError(f"{place('config.json')}: vocab_size must be a positive whole number, not {vocab!r}")
        ends: list[int] = []
        for source, where in ((generation, "generation_config.json"), (config, "config.json"), (inner, "config.json")):
            ends += _ids(source.get("eos_token_id"), place(where))
        ends += tokenizer.eos_ids
        return cls(
            tokenizer=tokenizer,
            template=ChatTemplate.load(folder, tokenizer, name=called),
            eos_ids=tuple(i for i in dict.fromkeys(ends) if i < vocab),
            vocab_size=vocab,
            defaults=sampling_defaults(generation, place("generation_config.json")),
            max_model_len=max_model_len,
            name=called,
        )

    @property
    def bos_id(self) -> int | None:
        return self.tokenizer.bos_id

    @property
    def has_chat_template(self) -> bool:
        return bool(self.template)

    def default_params(self, **given: Any) -> SamplingParams:
        """What the request gives over the model's defaults over OpenAI's.

        A field given as None counts as not given, except max_tokens, where None means the rest of the context.
        Raises RequestError naming a field that is wrong.
        """
        kept = {name: value for name, value in given.items() if value is not None or name == "max_tokens"}
        return SamplingParams(**{**self.defaults, **kept})

    def prompt_ids(self, prompt: str | Sequence[int], *, add_special: bool = True, param: str = "prompt") -> list[int]:
        """Ids of a raw prompt, given as text or as ids; checked.  RequestError says what is wrong with it."""
        if not isinstance(prompt, str):
            self.check_prompt_ids(prompt, param=param)
            return list(prompt)
        self._check_chars(prompt, param)
        ids = self.tokenizer.encode(prompt, add_special=add_special)
        self.check_prompt_ids(ids, param=param)
        return ids

    def chat_text(self, messages: Any, **options: Any) -> str:
        """The prompt text of a conversation; options as in `ChatTemplate.render`."""
        return self.template.render(plain_messages(messages), **options)

    def chat_ids(self, messages: Any, **options: Any) -> list[int]:
        """Ids of a conversation, checked.  The template writes BOS itself where the model wants it; none is added."""
        text = self.chat_text(messages, **options)
        self._check_chars(text, "messages")
        ids = self.tokenizer.encode(text, add_special=False)
        self.check_prompt_ids(ids, param="messages")
        return ids

    def check_prompt_ids(self, ids: Sequence[int], *, param: str = "prompt") -> None:
        """RequestError unless `ids` is a prompt that the model can take and that leaves room for one token."""
        if not ids:
            raise RequestError("the prompt is empty; give at least one token", param=param, code="empty_prompt")
        if set(map(type, ids)) != {int}:
            wrong = next(i for i in ids if type(i) is not int)
            raise RequestError(f"token ids must be whole numbers, not {wrong!r}", param=param)
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise RequestError(f"token id {wrong} is outside the vocabulary (0 to {self.vocab_size - 1})", param=param)
        if self.max_model_len is not None and len(ids) >= self.max_model_len:
            raise self._too_long(f"{len(ids)} tokens", param)

    def contrast_ids(self, given: Any, *, add_special: bool = True) -> list[int]:
        """Ids of the context that a prompt is contrasted with: text, ids, or the messages of a conversation.

        add_special: as for the prompt itself, where it is text.  Raises RequestError.
        """
        param = "weft.contrast"
        if isinstance(given, str):
            return self.prompt_ids(given, add_special=add_special, param=param)
        if not isinstance(given, Sequence):
            raise RequestError("contrast must be text, token ids, or messages", param=param)
        if given and isinstance(given[0], Mapping):
            return self.prompt_ids(self.chat_text(given), add_special=False, param=param)
        return self.prompt_ids(given, param=param)

    def request(
        self,
        id: int,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: bytes = b"",
        techniques: tuple[str, ...] = (),
        contrast: Sequence[int] = (),
        pooling: str = "",
        ttft_s: float | None = None,
    ) -> RequestSpec:
        """What the engine is asked for one prompt; its seed is drawn where `params` names none.

        techniques: laid over the server's stack.  contrast: ids of a second context.  ttft_s: as `RequestSpec.ttft_s`.
        Raises RequestError for ids that are no prompt (see `check_prompt_ids`) or parameters outside the vocabulary.
        """
        assert self.max_model_len is not None, "the engine's context is known before anything is asked of it"
        self.check_prompt_ids(ids)
        if contrast:
            self.check_prompt_ids(contrast, param="weft.contrast")
        room = self.max_model_len - max(len(ids), len(contrast))
        sampling = params.spec(eos=self.eos_ids, vocab=self.vocab_size, room=room)
        return RequestSpec(
            id=id,
            items=(TokenItem(tuple(ids)),),
            sampling=msgspec.structs.replace(sampling, pooling=pooling) if pooling else sampling,
            seed=secrets.randbits(64) if params.seed is None else params.seed & ((1 << 64) - 1),
            n=params.n,
            priority=priority,
            salt=salt,
            techniques=techniques,
            grammar=params.grammar,
            companions=((TokenItem(tuple(contrast)),),) if contrast else (),
            ttft_s=ttft_s,
        )

    @property
    def marks(self) -> frozenset[int]:
        """Special tokens that mark calls or thoughts of a family.  They are text where answers are read or held to a grammar."""
        ids = (self.tokenizer.token_to_id(text) for text in MARKS)
        return frozenset(i for i in ids if i is not None and i in self.tokenizer.special_ids and i not in self.eos_ids)

    def vocabulary(self) -> Vocabulary:
        """What each id stands for, as techniques read it."""
        tokenizer = self.tokenizer
        bare = {i for i in range(self.vocab_size) if tokenizer.id_to_token(i) is None}
        tokens = tuple(b"" if i in bare else tokenizer.token_bytes(i) for i in range(self.vocab_size))
        special = (bare | (tokenizer.special_ids - self.marks) | set(self.eos_ids)) & set(range(self.vocab_size))
        return Vocabulary(tokens, frozenset(special), self.eos_ids, Speller(tokenizer, tokens, special))

    def sequence(self, params: SamplingParams, shown: Collection[int] = ()) -> SequenceText:
        """The text of one output sequence under `params`: stop strings, stop ids, whether special tokens show.

        shown: special tokens that do in any case.
        """
        own = params.stop_token_ids or []
        return SequenceText(
            self.tokenizer,
            stops=params.stops,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            skip_special=params.skip_special_tokens,
            shown=shown,
            stop_ids=own if params.ignore_eos else (*own, *self.eos_ids),
        )

    def _check_chars(self, text: str, param: str) -> None:
        """Refuse a text that cannot fit the context before spending time on tokenizing it."""
        if self.max_model_len is None:
            return
        most = self.max_model_len * self.tokenizer.longest_token * _SHRINK
        if len(text) > most:
            raise self._too_long(f"{len(text)} characters", param)

    def _too_long(self, size: str, param: str) -> RequestError:
        return RequestError(
            f"the prompt has {size} and {self.name}'s context is {self.max_model_len} tokens, which must hold the "
            "prompt and at least one new token; shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )


def vocabulary_of(folder: Path) -> Vocabulary:
    """What the tokens of the model in a folder stand for.  Raises ConfigError where it has no tokenizer."""
    return ModelText.load(folder).vocabulary()


class Speller:
    """Text to ids whose bytes are exactly the text's, as the tokenizer writes it in the middle of a text.

    Tokenizers that put a space before every text are asked with a character before it, which is taken away again; where neither
    way gives the text's own bytes, it is the longest tokens from left to right.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[bytes], special: Collection[int]) -> None:
        self._tokenizer, self._tokens, self._special = tokenizer, tokens, frozenset(special)
        self._ids = {token: i for i, token in reversed([*enumerate(tokens)]) if token and i not in special}
        self._most = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        for before in ("", "\x02"):
            head = self._plain(before) if before else []
            ids = self._plain(before + text)
            if ids[: len(head)] == head and b"".join(self._tokens[i] for i in ids[len(head) :]) == text.encode():
                return ids[len(head) :]
        return longest(self._ids, text, self._most)

    def _plain(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special=False)
        if not self._special.isdisjoint(ids):  # other special tokens than marks are no text
            ids = self._tokenizer.encode(text, add_special=False, parse_special=False)
        return [i for i in ids if i < len(self._tokens)]


def longest(ids: Mapping[bytes, int], text: str, most: int) -> list[int]:
    """A text in the longest tokens, of at most `most` bytes, from left to right; bytes that no token has are left out."""
    data, found, at = text.encode(), [], 0
    while at < len(data):
        size = next((n for n in range(min(most, len(data) - at), 0, -1) if data[at : at + n] in ids), 0)
        if size:
            found.append(ids[data[at : at + size]])
        at += size or 1
    return found


def sampling_defaults(generation: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Sampling that a generation_config.json asks for, by the names of `SamplingParams`.

    `do_sample: false` means greedy, and then its other fields mean nothing.  Values that are not set are left out.
    ConfigError for values that are not numbers in range.
    """
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    defaults: dict[str, Any] = {}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        value = generation.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"{path}: {name} must be a number, not {value!r}")
        defaults[name] = int(value) if name == "top_k" else float(value)
    try:
        SamplingParams(**defaults)
    except RequestError as e:
        raise ConfigError(f"{path}: {e}; change the file") from e
    return defaults


def _described(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json, or what a GGUF file says in their place."""
    if is_gguf(folder):
        from weft.front.gguf import described

        return described(folder)
    return read_json(folder / "config.json"), read_json(folder / "generation_config.json")


def _ids(value: Any, path: Path) -> list[int]:
    """Ids that a configuration gives as one number, a list of them, or null."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int):
            raise ConfigError(f"{path}: eos_token_id must be an id or a list of ids, not {value!r}")
    return [i for i in ids if i >= 0]
