"""Request bodies of the OpenAI API as msgspec structs, with vLLM's extra sampling fields, and their strict reading.

A field that is known to change the answer and is not supported is refused, unless its value asks for what happens anyway: see
`NEUTRAL`.  Of one that is not known see `unknown`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Literal, TypeVar

import msgspec

from weft.errors import RequestError
from weft.front.openai import unknown
from weft.sampling import grammar
from weft.types import Grammar

MAX_SEQUENCES = 2048
"""Prompts times n in one call."""
MAX_SALT_CHARS = 256
MAX_BEST_OF = 20
"""OpenAI's bound."""
SMALL_BYTES = 1 << 20
"""A body up to this size is decoded without a second thought."""
MAX_QUOTES = 500_000
MAX_COMMAS = 2_000_000
HALF_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")
SHOWN_CHARS = 300
MAX_TECHNIQUES = 16
"""Parts that one request may lay over the server's stack."""


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The last two change no token: padding against listeners, and counts before the last chunk, neither of which weft sends."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class Own(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename={"techniques": "with"}):
    """weft's own field of a request, `weft`.  Unknown keys are refused: each of them would change the answer.

    with: parts laid over the server's stack for this request.  label: whether the answer says which techniques touched it.
    contrast: a prompt, or messages, without what the answer should rest on, for a technique that contrasts the two.
    stack: as label.  timeline: whether the answer says what became of it, moment by moment.
    ttft_s: within how many seconds its first token is wanted, for a schedule that goes by that; 0 for whenever it comes.
    """

    techniques: list[str] | None = None
    label: bool | None = None
    contrast: str | list[dict[str, Any]] | None = None
    stack: bool | None = None
    timeline: bool | None = None
    ttft_s: float | None = None


class JSONSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename={"schema_": "schema"}):
    """OpenAI's `response_format.json_schema`.  An answer is held to its schema whether `strict` is set or not."""

    schema_: dict[str, Any] | bool | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`: what an answer has to look like, one of these."""

    json: dict[str, Any] | bool | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Fields(msgspec.Struct, kw_only=True):
    """What chat and completions have in common.  None is "not given" everywhere, as clients send null for it."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # vLLM's additions
    best_of: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    structured_outputs: StructuredOutputs | None = None
    # weft's own
    weft: Own | None = None

    @property
    def drawn(self) -> int:
        """Answers that are drawn to each prompt."""
        return max(self.n or 1, self.best_of or 1)

    @property
    def parts(self) -> list[str]:
        """What the request lays over the server's stack: the techniques that it names, and those that its fields stand for."""
        named = list((self.weft and self.weft.techniques) or [])
        if self.drawn > (self.n or 1):
            named.append(f"search=best_of_n(n={self.drawn}, keep={self.n or 1})")
        return named

    @property
    def structured(self) -> dict[str, Any] | None:
        """What an answer has to look like, by the names of `structured_outputs`.  Raises RequestError."""
        own, asked = self.structured_outputs, self.response_format
        if asked is None or asked.type == "text":
            return None if own is None else {k: v for k, v in msgspec.structs.asdict(own).items() if v is not None}
        if own is not None:
            text = "response_format and structured_outputs both say what the answer looks like; leave one of them out"
            raise RequestError(text, param="structured_outputs")
        if asked.type == "json_object":
            return {"json_object": True}
        if asked.json_schema is None or asked.json_schema.schema_ is None:
            text = "response_format of type json_schema needs json_schema: {name, schema}"
            raise RequestError(text, param="response_format")
        return {"json": asked.json_schema.schema_}

    @property
    def grammar(self) -> Grammar | None:
        """The same as the engine gets it.  Raises RequestError."""
        return grammar(self.structured)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(Fields, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]] | None = None
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None


class ChatRequest(Fields, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int] | None = None


class LoadRequest(msgspec.Struct, kw_only=True):
    """Body of POST /v1/load_lora_adapter."""

    lora_name: str | None = None
    lora_path: str | None = None


class UnloadRequest(msgspec.Struct, kw_only=True):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: str | None = None


# Fields that change the answer, for routes that do not have them, each with the values that ask for nothing special (null
# always does).
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "suffix": ("",),
    # vLLM
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structural_tag": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "logits_processors": ([],),
    "thinking_token_budget": (),
    "spaces_between_special_tokens": (True,),
    "chat_template": (),
    "documents": ([],),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    # llama.cpp
    "grammar": ("",),
    "json_schema": ({},),
    "n_predict": (),
    "typical_p": (1,),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "samplers": (),
    "repeat_penalty": (1,),
    # SGLang and others
    "regex": (),
    "ebnf": (),
    "enable_thinking": (),
}
NEVER: dict[str, tuple[Any, ...]] = {
    "prompt_embeds": (),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
    "prompt_logprobs": (),
}
"""Refused on every route, whatever else it takes: tensors of clients, and what would say how a server is laid out."""
INSTEAD = {
    "suffix": "give the text before the completion only",
    "n_predict": "use max_tokens",
    "repeat_penalty": "use repetition_penalty",
    "enable_thinking": "give it in chat_template_kwargs",
    "reasoning_effort": "give it in chat_template_kwargs if the model's template reads it",
    "chat_template": "a completion goes through no template",
    "tools": "they belong to /v1/chat/completions",
    "tool_choice": "it belongs to /v1/chat/completions",
    "prompt_logprobs": "use echo with logprobs in /v1/completions",
    "truncate_prompt_tokens": "shorten the prompt; it is never cut",
}
STRUCTURED = (
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "grammar",
    "json_schema",
    "structural_tag",
    "regex",
    "ebnf",
)
INSTEAD |= dict.fromkeys(
    STRUCTURED, "use structured_outputs with json, json_object, regex, choice or grammar, or response_format"
)

R = TypeVar("R", bound=msgspec.Struct)


def read(
    body: bytes,
    kind: type[R],
    neutral: dict[str, tuple[Any, ...]] = NEUTRAL,
    *,
    lenient: bool,
    harmless: Collection[str] = unknown.OPENAI,
) -> R:
    """Decode a request body.  Raises RequestError naming the field and what is wrong with it.

    neutral: unsupported fields, as in NEUTRAL.  lenient, harmless: see `unknown.check`.
    """
    if len(body) > SMALL_BYTES:
        _check_values(body)
    try:
        given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        refused = {**NEVER, **neutral}
        others = {n: value for n, value in given.items() if n not in kind.__struct_fields__}
        _refuse(others, refused)
        request = msgspec.json.decode(body, type=kind)
        if others:
            unknown.check(others, {*kind.__struct_fields__, *refused}, harmless, lenient)
        return request
    except msgspec.ValidationError as error:
        raise RequestError(_sentence(str(error)), param=_field(str(error)), code="invalid_value") from None
    except msgspec.DecodeError as error:
        raise RequestError(_not_json(body, str(error)), code="invalid_json") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not valid UTF-8: {error.reason}", code="invalid_json") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply; flatten it", code="invalid_json") from None


def _not_json(body: bytes, said: str) -> str:
    """The decoder says of several things that the body was cut short."""
    if not body.strip():
        return "the body is empty; send a JSON object"
    if HALF_PAIR.search(body):
        return "the body is not valid JSON: an escape such as \\ud83d stands without the other half of its character"
    return f"the body is not valid JSON: {said}"


def _check_values(body: bytes) -> None:
    """Refuse more values than any request has, which would hold up everybody while they are decoded.  Two looks at the bytes, and
    never too few: a string has two quotation marks, of which a backslash at its end can hide one; an array has its commas.
    """
    if body.count(b'"') - body.count(b'\\"') > MAX_QUOTES or body.count(b",") > MAX_COMMAS:
        raise RequestError("the body has too many values; send less at once", code="body_too_large")


def _refuse(fields: dict[str, msgspec.Raw], neutral: dict[str, tuple[Any, ...]]) -> None:
    """Refuse what weft can't do, rather than answer another question than the one asked."""
    for name in fields.keys() & neutral.keys():
        value = msgspec.json.decode(fields[name])
        if value is None or any(_same(value, plain) for plain in neutral[name]):
            continue
        hint = INSTEAD.get(name, "leave it out")
        raise RequestError(f"{name} is not supported: {hint}", param=name, code="unsupported_parameter")


def _same(value: Any, neutral: Any) -> bool:
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _sentence(text: str) -> str:
    """msgspec's message with the place first: "temperature: expected `float | null`, got `str`"."""
    what, _, where = text.partition(" - at ")
    where = where.strip("`").replace("key` in `", "a key of ").replace("$.", "").replace("$", "the body")
    return f"{where[:SHOWN_CHARS] or 'the body'}: {what[:1].lower()}{shortened(what)[1:]}"


def shortened(text: str) -> str:
    """An error's words, which may quote a value of any length."""
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def _field(text: str) -> str | None:
    found = re.search(r"\$\.(\w+)", text)
    return found.group(1) if found else None
