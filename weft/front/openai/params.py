"""From a request's fields to `SamplingParams`, with the model's own defaults where the client says nothing."""

from __future__ import annotations

from weft.errors import RequestError
from weft.front.openai.structs import MAX_BEST_OF, MAX_SALT_CHARS, MAX_SEQUENCES, Fields
from weft.front.text import ModelText
from weft.sampling import SamplingParams

PLAIN = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
)
"""Fields that mean the same in a request and in SamplingParams."""


def sampling_params(
    text: ModelText,
    fields: Fields,
    *,
    max_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The parameters that a request asks for.

    max_tokens: None for the rest of the context.  Raises RequestError naming the field.
    """
    if fields.best_of is not None and not (fields.n or 1) <= fields.best_of <= max(MAX_BEST_OF, fields.n or 1):
        raise RequestError(
            f"best_of must be from n ({fields.n or 1}) to {MAX_BEST_OF}, got {fields.best_of}: so many answers are drawn, "
            "and the n likeliest of them returned",
            param="best_of",
        )
    if fields.stream_options is not None and not fields.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    given = {name: getattr(fields, name) for name in PLAIN}
    given["structured_outputs"] = fields.structured
    return text.default_params(**given, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)


def routing(fields: Fields) -> tuple[int, bytes]:
    """(priority, salt) of a request.  Raises RequestError."""
    priority = fields.priority or 0
    if not -(1 << 31) <= priority < 1 << 31:
        raise RequestError("priority must fit 32 bits; lower runs first", param="priority")
    salt = fields.cache_salt or ""
    if len(salt) > MAX_SALT_CHARS:
        raise RequestError(f"cache_salt must have at most {MAX_SALT_CHARS} characters", param="cache_salt")
    return priority, salt.encode()


def check_sequences(prompts: int, n: int) -> None:
    """Raise RequestError when one call asks for too many sequences."""
    if prompts * n > MAX_SEQUENCES:
        raise RequestError(
            f"{prompts} prompts with n = {n} are {prompts * n} sequences; one call takes {MAX_SEQUENCES}: make several",
            param="prompt" if prompts > 1 else "n",
        )
