"""Log-probabilities in the shapes of both APIs.

In chat each token is text and bytes; a token that is only part of a character shows its bytes as `\\xe2\\x80` there and
as `bytes:\\xe2\\x80` in completions, where alternatives are keys of an object and must differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from weft.front.detokenize import SequenceText
from weft.front.tokenizer import Tokenizer
from weft.types import TokenLogprob

LOWEST = -9999.0
"""What stands for minus infinity, which JSON cannot say (OpenAI's choice)."""


class Alternative(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatToken]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """OpenAI's four parallel lists.  The first token of an echoed prompt has null for both kinds of logprobs."""

    text_offset: list[int] = []
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []

    def extend(self, other: CompletionLogprobs) -> None:
        self.text_offset += other.text_offset
        self.token_logprobs += other.token_logprobs
        self.tokens += other.tokens
        self.top_logprobs += other.top_logprobs


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> ChatLogprobs:
    """`logprobs` of a chat choice."""
    content = []
    for entry in entries:
        chosen = _alternative(tokenizer, entry.token, entry.logprob)
        top = [_alternative(tokenizer, token, logprob) for token, logprob in entry.top]
        content.append(ChatToken(chosen.token, chosen.logprob, chosen.bytes, top))
    return ChatLogprobs(content)


def completion_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprob], offsets: Sequence[int]
) -> CompletionLogprobs:
    """`logprobs` of a completion choice, with the offset of each token in the choice's text."""
    out = CompletionLogprobs(text_offset=list(offsets))
    names: dict[int, str] = {}  # of a whole prompt the same tokens come again and again

    def name(token: int) -> str:
        found = names.get(token)
        if found is None:
            found = names[token] = completion_token(tokenizer, token)
        return found

    for entry in entries:
        out.tokens.append(name(entry.token))
        out.token_logprobs.append(finite(entry.logprob))
        top: dict[str, float] = {}
        for token, logprob in entry.top:
            top.setdefault(name(token), finite(logprob))
        top.setdefault(out.tokens[-1], finite(entry.logprob))  # OpenAI always reports the chosen token
        out.top_logprobs.append(top)
    return out


def completion_token(tokenizer: Tokenizer, token: int) -> str:
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def token_offsets(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """For each id, the length of the text before it, special tokens counting nothing."""
    text = SequenceText(tokenizer)
    text.push(ids)
    return text.offsets


def finite(logprob: float) -> float:
    """A logprob that JSON can carry."""
    return logprob if logprob > LOWEST else LOWEST


def _alternative(tokenizer: Tokenizer, token: int, logprob: float) -> Alternative:
    raw = tokenizer.token_bytes(token)
    return Alternative(raw.decode("utf-8", "backslashreplace"), finite(logprob), list(raw))
