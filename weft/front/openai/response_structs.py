"""Body of POST /v1/responses, and the chat request that says the same."""

from __future__ import annotations

from typing import Any

import msgspec

from weft.front.openai.structs import ChatRequest, Own

LOGPROBS = "message.output_text.logprobs"
"""The one word of `include` that means something here."""


class ResponseStreamOptions(msgspec.Struct):
    include_obfuscation: bool | None = None
    """Padding against listeners, which weft does not send."""


class ResponseRequest(msgspec.Struct, kw_only=True):
    """OpenAI's fields, and the sampling fields that completions and chat have too.  None is "not given"."""

    model: str | None = None
    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    include: list[str] | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    metadata: dict[str, str] | None = None
    # as in chat
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    weft: Own | None = None

    @property
    def keeps(self) -> bool:
        """Whether the client wants the response kept; OpenAI's default is that it does."""
        return self.store is not False

    @property
    def with_logprobs(self) -> bool:
        return self.top_logprobs is not None or LOGPROBS in (self.include or ())

    def as_chat(self, messages: list[dict[str, Any]]) -> ChatRequest:
        """The same request for a conversation that is laid out already."""
        same = {name: getattr(self, name) for name in SAME}
        return ChatRequest(
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            logprobs=self.with_logprobs,
            top_logprobs=self.top_logprobs,
            **same,
        )


SAME = tuple(
    name
    for name in ResponseRequest.__struct_fields__
    if name in ChatRequest.__struct_fields__ and name not in ("stream", "stream_options", "top_logprobs")
)
"""Fields that mean in chat what they mean here."""

# Unsupported fields that change the answer, as in `structs.NEUTRAL`.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "max_tool_calls": (),
    "text": ({}, {"format": {"type": "text"}}, {"verbosity": "medium"}, {"format": {"type": "text"}, "verbosity": "medium"}),
    "reasoning": ({}, {"effort": None}, {"effort": None, "summary": None}),
    "conversation": (),
    "context_management": ([],),
    "prompt": (),
    "truncation": ("disabled",),
    "moderation": (),
    "n": (1,),
    "max_tokens": (),
    "messages": (),
}  # fmt: skip
