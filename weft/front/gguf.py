"""The text side of a GGUF file: its tokenizer, chat templates, end tokens and default sampling, from the metadata.

    tokenizer.ggml.model    llama: SentencePiece BPE (pieces with scores)      gpt2: byte-level BPE (tokens and merges)
    tokenizer.ggml.pre      how byte-level BPE splits text into words; the patterns are not in the file, only their name

Source: the format's specification (docs/gguf.md of ggml), and the tokenizers of the models that the names stand for.  Ids are
those of the original tokenizers, which ggml's own vectors were made with; so Qwen's text is put into NFC first, which
llama.cpp leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from weft.errors import ConfigError
from weft.front.convert import CL100K, O200K, QWEN2
from weft.front.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, SentencePieceModel, backend_of
from weft.models.gguf.header import read

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
_DIGIT, _DIGITS, _THREE_DIGITS = r"\p{N}", r"\p{N}+", "[0-9][0-9][0-9]"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS: dict[str, tuple[str, ...]] = {
    "default": (_PUNCTUATION, _GPT2, _DIGITS, _THREE_DIGITS),
    "falcon": (_PUNCTUATION.replace(r"\|", r"\|`"), _GPT2, _THREE_DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "granite-docling"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (_DIGIT, _GPT2)
    ),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), (CL100K,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), (QWEN2,)),
    **dict.fromkeys(("gpt-4o", "llama4"), (O200K,)),
    "tekken": (_TEKKEN,),
}
"""Names of `tokenizer.ggml.pre`, and the patterns that part text one after the other, each within the parts of those before."""
WHOLE_WORDS = frozenset(("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"))
"""Names whose words are tokens when the vocabulary has them, whatever the merges say; they also put BOS before text."""
COMPOSED = frozenset(("qwen2", "deepseek-r1-qwen", "megrez"))
"""Names whose text is put into Unicode's NFC."""

ENDS = frozenset(
    "<|eot_id|> <|eom_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <EOT> <|eot|>".split()
)
"""Control tokens that end an answer wherever they are."""
ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
MAX_TOKENS, MAX_TOKEN_CHARS, MAX_CHARS = 1 << 20, 1 << 10, 1 << 24
"""The largest vocabularies have 260,000 tokens, of up to 256 characters, and 2 million characters together."""


class _Vocabulary:
    """The keys below `tokenizer.ggml`, each checked.  tokens: texts by id.  kinds: of each (see `sentencepiece`)."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = metadata
        self.model = metadata.get("tokenizer.ggml.model")
        if self.model not in ("llama", "gpt2"):
            raise ConfigError(
                f"{path}: the tokenizer {str(self.model)[:40]!r} (tokenizer.ggml.model) is not read; weft reads llama "
                "(SentencePiece) and gpt2 (BPE): use the safetensors checkpoint of this model"
            )
        tokens = self.array("tokens", str)
        if not tokens:
            raise ConfigError(f"{path} has no tokenizer.ggml.tokens: there is no tokenizer in it")
        if len(tokens) > MAX_TOKENS or max(map(len, tokens)) > MAX_TOKEN_CHARS or sum(map(len, tokens)) > MAX_CHARS:
            raise ConfigError(
                f"{path}: tokenizer.ggml.tokens has {len(tokens)} tokens of up to {max(map(len, tokens))} characters, which is "
                f"more than any vocabulary has (at most {MAX_TOKENS}, of at most {MAX_TOKEN_CHARS}, {MAX_CHARS} together)"
            )
        self.tokens: tuple[str, ...] = tokens
        self.kinds: tuple[int, ...] = self.array("token_type", int, len(tokens)) or (NORMAL,) * len(tokens)
        if len(set(tokens)) != len(tokens):
            raise ConfigError(f"{path}: tokenizer.ggml.tokens lists a token twice; convert the model again")

    def array(self, name: str, kind: type, count: int | None = None) -> tuple[Any, ...]:
        """A key's values, () where there is none; as many as `count`."""
        values = self.metadata.get(f"tokenizer.ggml.{name}", ())
        if not isinstance(values, tuple) or (values and type(values[0]) is not kind):
            raise ConfigError(f"{self.path}: tokenizer.ggml.{name} is no array of {kind.__name__}")
        if values and count is not None and len(values) != count:
            raise ConfigError(f"{self.path}: tokenizer.ggml.{name} has {len(values)} values for {count} tokens")
        return values

    def flag(self, name: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.path}: tokenizer.ggml.{name} must be true or false")
        return value

    def id(self, name: str) -> int | None:
        """A token's id; None where the key is missing, or is the largest number, which stands for none."""
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None or value in (0xFFFFFFFF, -1):
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise ConfigError(
                f"{self.path}: tokenizer.ggml.{name} is {str(value)[:40]}; there are {len(self.tokens)} tokens"
            )
        return value


def tokenizer(path: Path) -> tuple[Backend, dict[str, Any]]:
    """A backend, and what tokenizer_config.json would have said.  Raises ConfigError naming the key that is wrong."""
    metadata = read(path).metadata
    vocabulary = _Vocabulary(path, metadata)
    named: dict[str, Any] = {
        f"{role}_token": vocabulary.tokens[i] for role, key in ROLES.items() if (i := vocabulary.id(key)) is not None
    }
    if vocabulary.model == "llama":
        backend, defaults = _sentencepiece(vocabulary)
        named = {**defaults, **named}
    else:
        backend = _byte_pairs(vocabulary)
        named["add_bos_token"] = vocabulary.metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
    named["add_bos_token"] = vocabulary.flag("add_bos_token", bool(named["add_bos_token"]))
    named["add_eos_token"] = vocabulary.flag("add_eos_token", False)
    templates = _templates(path, metadata)
    return backend, {**named, **({"chat_template": templates} if templates else {})}


def described(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json, generation_config.json) as far as the text side reads them.  Raises ConfigError."""
    header = read(path)
    vocabulary = _Vocabulary(path, header.metadata)
    ends = [vocabulary.id(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    ends += [i for i, text in enumerate(vocabulary.tokens) if text in ENDS and vocabulary.kinds[i] != NORMAL]
    generation: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(i for i in ends if i is not None))}
    for name, key in SAMPLING.items():
        if f"general.sampling.{key}" in header.metadata:
            value = header.metadata[f"general.sampling.{key}"]
            generation[name] = float(f"{value:.7g}") if isinstance(value, float) else value  # 0.7 came through float32
    embedding = header.tensors.get("token_embd.weight")
    rows = len(vocabulary.tokens) if embedding is None else embedding.shape[0]
    return {"vocab_size": rows}, generation


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Backend, dict[str, Any]]:
    tokens, kinds = vocabulary.tokens, vocabulary.kinds
    scores = vocabulary.array("scores", float, len(tokens))
    if not scores:
        raise ConfigError(f"{vocabulary.path} has no tokenizer.ggml.scores, which SentencePiece needs")
    unknown = vocabulary.id("unknown_token_id")
    model = SentencePieceModel(
        pieces=list(zip(tokens, scores, kinds)),
        unk_id=0 if unknown is None else unknown,
        byte_fallback=BYTE in kinds,
        add_dummy_prefix=vocabulary.flag("add_space_prefix", True),
        remove_extra_whitespaces=vocabulary.flag("remove_extra_whitespaces", False),
    )
    return backend_of(vocabulary.path, model)


def _byte_pairs(vocabulary: _Vocabulary) -> Backend:
    path, tokens = vocabulary.path, vocabulary.tokens
    name = vocabulary.metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in PATTERNS:
        raise ConfigError(
            f"{path}: how {str(name)[:40]!r} (tokenizer.ggml.pre) splits text is not known; weft knows "
            f"{', '.join(sorted(PATTERNS))}: use the safetensors checkpoint of this model"
        )
    merges = [_pair(path, merge) for merge in vocabulary.array("merges", str)]
    try:
        backend = Backend(
            models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, ignore_merges=name in WHOLE_WORDS)
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # the library raises plain Exception for a merge that the vocabulary lacks, or panics
        raise ConfigError(f"{path}: tokenizer.ggml.merges cannot be used ({error})") from None
    if name in COMPOSED:
        backend.normalizer = normalizers.NFC()
    words = [pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False) for pattern in PATTERNS[name]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text, kind in zip(tokens, vocabulary.kinds)
            if kind in (CONTROL, UNKNOWN) and text
        ]
    )
    backend.add_tokens(
        [
            AddedToken(text, special=False, normalized=False)
            for text, kind in zip(tokens, vocabulary.kinds)
            if kind == USER_DEFINED and text
        ]
    )
    return backend


def _pair(path: Path, merge: str) -> tuple[str, str]:
    """A merge; its two halves are parted by the first space behind the first character, as halves are never empty."""
    at = merge.find(" ", 1)
    if at < 0 or at == len(merge) - 1:
        raise ConfigError(f"{path}: tokenizer.ggml.merges has {merge[:40]!r}; expected two tokens and a space between")
    return merge[:at], merge[at + 1 :]


def _templates(path: Path, metadata: Mapping[str, Any]) -> list[dict[str, str]]:
    """Chat templates by name, as tokenizer_config.json lists them."""
    found = {"default": metadata.get("tokenizer.chat_template")}
    prefix = "tokenizer.chat_template."
    found |= {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    kept = {name: template for name, template in found.items() if template is not None}
    if not all(isinstance(template, str) for template in kept.values()):
        raise ConfigError(f"{path}: tokenizer.chat_template must be text")
    return [{"name": name, "template": str(template)} for name, template in kept.items()]
