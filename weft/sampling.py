"""`SamplingParams`: what a caller asks of the tokens, checked, with every limit named.

Names and defaults follow vLLM's offline API and OpenAI's request fields.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from weft.errors import RequestError
from weft.types import Grammar, SamplingSpec

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 1024
MAX_BIAS = 1024
MAX_GRAMMAR_CHARS = 1 << 20
STRUCTURES = ("json", "json_object", "regex", "choice", "grammar")
"""What `structured_outputs` may hold, one of them."""
SEED_LIMIT = 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to draw tokens, and when to stop.

    n               sequences for each prompt, 1 to 128
    temperature     0 is greedy; at most 100
    top_p           keep the smallest set of tokens whose probability reaches top_p; in (0, 1]
    top_k           keep the k likeliest; 0 or -1 keeps all
    min_p           drop tokens less likely than min_p times the likeliest; in [0, 1]
    repetition_penalty   >1 makes tokens of prompt and output less likely (Keskar et al., arXiv:1909.05858); in (0, 100]
    presence_penalty, frequency_penalty   OpenAI's, on output tokens; in [-2, 2]
    logit_bias      {token id: added to its logit, in [-100, 100]}
    seed            64-bit; same seed, same tokens, whatever else the engine does.  None draws one
    max_tokens      tokens to generate; None means as many as the context holds (LLM default 16, as elsewhere)
    min_tokens      no end of sequence before so many
    stop            strings that end the text; they are not part of it unless include_stop_str_in_output
    stop_token_ids  ids that end it
    ignore_eos      go on after the model's own end tokens
    logprobs        alternatives to report for each token, 0 to 20; None reports none
    prompt_logprobs the same for the prompt's tokens
    skip_special_tokens   leave special tokens out of the text
    structured_outputs    what the text has to look like, one of {"json": schema}, {"json_object": True}, {"regex": text},
                    {"choice": [texts]} and {"grammar": Lark or GBNF}; vLLM's names

    Raises RequestError naming the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: Mapping[str, Any] | None = None
    stops: tuple[str, ...] = field(init=False, repr=False, default=())
    """`stop` as a tuple."""
    grammar: Grammar | None = field(init=False, repr=False, default=None)
    """`structured_outputs` as the engine gets it."""

    def __post_init__(self) -> None:
        _whole("n", self.n, 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _whole("top_k", self.top_k, -1, 1 << 31)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _whole("seed", self.seed, -(1 << 63), SEED_LIMIT - 1)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, 1 << 31)
        _whole("min_tokens", self.min_tokens, 0, 1 << 31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", param="min_tokens"
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _whole(name, value, 0, MAX_LOGPROBS)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {_shown(getattr(self, name))}", param=name)
        stops = (self.stop,) if isinstance(self.stop, str) else _sequence("stop", self.stop)
        if len(stops) > MAX_STOP_STRINGS:
            raise RequestError(f"stop: at most {MAX_STOP_STRINGS} strings, got {len(stops)}", param="stop")
        for s in stops:
            if not isinstance(s, str) or not 0 < len(s) <= MAX_STOP_CHARS:
                raise RequestError(f"stop: each must be a string of 1 to {MAX_STOP_CHARS} characters", param="stop")
        object.__setattr__(self, "stops", stops)
        ids = _sequence("stop_token_ids", self.stop_token_ids)
        if len(ids) > MAX_STOP_IDS:
            raise RequestError(f"stop_token_ids: at most {MAX_STOP_IDS}, got {len(ids)}", param="stop_token_ids")
        for i in ids:
            _whole("stop_token_ids", i, 0, 1 << 31)
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, dict):
            raise RequestError(f"logit_bias must map token ids to numbers, got {_shown(bias)}", param="logit_bias")
        if len(bias) > MAX_BIAS:
            raise RequestError(f"logit_bias: at most {MAX_BIAS} entries, got {len(bias)}", param="logit_bias")
        for token, value in bias.items():
            _whole("logit_bias", token, 0, 1 << 31)
            _number("logit_bias", value, -100.0, 100.0)
        object.__setattr__(self, "grammar", grammar(self.structured_outputs))

    def spec(self, *, eos: Iterable[int], vocab: int, room: int) -> SamplingSpec:
        """The engine's form of these parameters for one prompt.

        eos: the model's end ids.  vocab: its vocabulary size.  room: tokens left in the context after the prompt.
        Raises RequestError for ids outside the vocabulary.
        """
        own = tuple(self.stop_token_ids or ())
        for name, ids in (("logit_bias", self.logit_bias or {}), ("stop_token_ids", own)):
            for i in ids:
                if i >= vocab:
                    raise RequestError(f"{name}: id {i} is outside the vocabulary (0 to {vocab - 1})", param=name)
        ends = own if self.ignore_eos else (*own, *eos)
        return SamplingSpec(
            temperature=float(self.temperature),
            top_p=float(self.top_p),
            top_k=max(0, self.top_k),
            min_p=float(self.min_p),
            repetition_penalty=float(self.repetition_penalty),
            presence_penalty=float(self.presence_penalty),
            frequency_penalty=float(self.frequency_penalty),
            logit_bias=dict(self.logit_bias or {}),
            logprobs=-1 if self.logprobs is None else self.logprobs,
            prompt_logprobs=-1 if self.prompt_logprobs is None else self.prompt_logprobs,
            max_tokens=room if self.max_tokens is None else min(self.max_tokens, room),
            min_tokens=self.min_tokens,
            stop_ids=tuple(dict.fromkeys(ends)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """Beam search as `LLM.beam_search` takes it.

    beam_width      beams kept at each position, 1 to 64
    max_tokens      tokens of a continuation
    length_penalty  a continuation's score is the sum of its log-probabilities / length ** length_penalty
    early_stopping  end once beam_width continuations have ended, rather than when no live beam is expected to beat them
    ignore_eos      go on after the model's own end tokens
    n               continuations to return, best first; None for beam_width
    """

    beam_width: int = 4
    max_tokens: int = 16
    length_penalty: float = 1.0
    early_stopping: bool = False
    ignore_eos: bool = False
    n: int | None = None

    def __post_init__(self) -> None:
        _whole("beam_width", self.beam_width, 1, 64)
        _whole("max_tokens", self.max_tokens, 1, 1 << 31)
        _number("length_penalty", self.length_penalty, -1000.0, 1000.0)
        if self.n is not None:
            _whole("n", self.n, 1, self.beam_width)
        for name in ("early_stopping", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {_shown(getattr(self, name))}", param=name)


def grammar(given: Mapping[str, Any] | None) -> Grammar | None:
    """What `structured_outputs` asks for; it may be a JSON text where a schema is meant.  Raises RequestError."""
    if given is None:
        return None
    name = "structured_outputs"
    if not isinstance(given, Mapping):
        raise RequestError(f"{name} must be an object with one of {', '.join(STRUCTURES)}", param=name)
    unknown = sorted(str(key) for key in given.keys() - set(STRUCTURES))
    if unknown:
        raise RequestError(f"{name} has no {_shown(unknown[0])}; it has: {', '.join(STRUCTURES)}", param=name)
    asked = [key for key in STRUCTURES if given.get(key) is not None and given[key] is not False]
    if len(asked) != 1:
        raise RequestError(
            f"{name} must hold one of {', '.join(STRUCTURES)}, got {' and '.join(asked) or 'none'}", param=name
        )
    kind, value = asked[0], given[asked[0]]
    if kind == "json_object":
        if value is not True:
            raise RequestError(f"{name}.json_object must be true or false, got {_shown(value)}", param=name)
        return Grammar("json", '{"type": "object"}')
    if kind == "json":
        source = value if isinstance(value, str) else _written(value)
        return Grammar("json", _sized(kind, source))
    if kind == "choice":
        if not isinstance(value, list | tuple) or not value or not all(isinstance(one, str) for one in value):
            raise RequestError(f"{name}.choice must be a list of texts", param=name)
        return Grammar("choice", _sized(kind, _written(list(value))))
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name}.{kind} must be a text", param=name)
    return Grammar("regex" if kind == "regex" else "grammar", _sized(kind, value))


def _sized(kind: str, source: str) -> str:
    if len(source) > MAX_GRAMMAR_CHARS:
        raise RequestError(
            f"structured_outputs.{kind} has {len(source)} characters, at most {MAX_GRAMMAR_CHARS} are read; make it smaller",
            param="structured_outputs",
        )
    return source


def _written(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"structured_outputs is not plain JSON ({error})", param="structured_outputs") from None


def _shown(value: Any) -> str:
    """A value as an error text may show it: short, whatever it is (Python refuses to write numbers of 5,000 digits)."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of very many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise RequestError(f"{name} must be a list, got {_shown(value)}", param=name)
    return tuple(value)


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be a whole number, got {_shown(value)}", param=name)
    if not low <= value <= high:
        raise RequestError(f"{name} must be from {low} to {high}, got {_shown(value)}", param=name)


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    # A whole number may be too large for a float, and is then out of every bound below.
    finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not finite:
        raise RequestError(f"{name} must be a finite number, got {_shown(value)}", param=name)
    if value > high or value < low or (open_low and value == low):
        edge = "above" if open_low else "at least"
        raise RequestError(f"{name} must be {edge} {low:g} and at most {high:g}, got {_shown(value)}", param=name)
