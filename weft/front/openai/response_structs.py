"""Body of POST /v1/responses, and the chat request that says the same."""

from __future__ import annotations

from typing import Any

import msgspec

from weft.errors import RequestError
from weft.front.openai.structs import ChatRequest, Own, ResponseFormat, StructuredOutputs, shortened

LOGPROBS = "message.output_text.logprobs"
"""The one word of `include` that means something here."""


class ResponseStreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
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
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
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
    structured_outputs: StructuredOutputs | None = None
    weft: Own | None = None

    @property
    def keeps(self) -> bool:
        """Whether the client wants the response kept; OpenAI's default is that it does."""
        return self.store is not False

    @property
    def with_logprobs(self) -> bool:
        return self.top_logprobs is not None or LOGPROBS in (self.include or ())

    def as_chat(self, messages: list[dict[str, Any]]) -> ChatRequest:
        """The same request for a conversation that is laid out already.  Raises RequestError."""
        same = {name: getattr(self, name) for name in SAME}
        return ChatRequest(
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            logprobs=self.with_logprobs,
            top_logprobs=self.top_logprobs,
            response_format=self._format(),
            tools=None if self.tools is None else [_tool(i, tool) for i, tool in enumerate(self.tools)],
            tool_choice=_choice(self.tool_choice),
            **same,
        )

    def _format(self) -> ResponseFormat | None:
        """`text.format` as chat has it."""
        given = dict(self.text or {})
        form, _ = given.pop("format", None), given.pop("verbosity", None)
        if given:
            raise RequestError(f"text has no key {next(iter(given))[:40]!r}", param="text")
        if form is None:
            return None
        if isinstance(form, dict) and form.get("type") == "json_schema":
            form = {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}
        try:
            return msgspec.convert(form, ResponseFormat)
        except msgspec.ValidationError as error:
            raise RequestError(f"text.format: {shortened(str(error))}", param="text") from None


def _tool(index: int, tool: dict[str, Any]) -> dict[str, Any]:
    """A function as chat has it, with its name and parameters in an object of their own."""
    if tool.get("type") != "function":
        raise RequestError(
            f"tools[{index}] is of type {str(tool.get('type'))[:40]!r}; weft has no tools of its own: give functions",
            param="tools",
        )
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _choice(given: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(given, dict):
        return given
    if given.get("type") == "allowed_tools" and isinstance(given.get("tools"), list):
        tools = [_choice(tool) if isinstance(tool, dict) else tool for tool in given["tools"]]
        return {"type": "allowed_tools", "allowed_tools": {"mode": given.get("mode"), "tools": tools}}
    return {"type": given.get("type"), "function": {"name": given.get("name")}}


SAME = tuple(
    name
    for name in ResponseRequest.__struct_fields__
    if name in ChatRequest.__struct_fields__
    and name not in ("stream", "stream_options", "top_logprobs", "tools", "tool_choice")
)
"""Fields that mean in chat what they mean here."""

# Unsupported fields that change the answer, as in `structs.NEUTRAL`.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "max_tool_calls": (),
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
