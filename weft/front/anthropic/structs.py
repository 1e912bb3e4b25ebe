"""Bodies of POST /v1/messages and /v1/messages/count_tokens, and the chat request that says the same.

Source of the shapes: Anthropic's API reference, "Messages".
"""

from __future__ import annotations

from typing import Any

import msgspec

from weft.errors import RequestError
from weft.front.openai.structs import ChatRequest, Own

Blocks = str | list[dict[str, Any]]


class Message(msgspec.Struct):
    """One turn."""

    role: str
    content: Blocks


class CountRequest(msgspec.Struct, kw_only=True):
    """Body of POST /v1/messages/count_tokens."""

    model: str | None = None
    messages: list[Message] | None = None
    system: Blocks | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def as_chat(self, **more: Any) -> ChatRequest:
        """The same conversation for chat.  One that ends with the assistant's words goes on with them.  Raises RequestError."""
        if not self.messages:
            raise RequestError("messages is missing or empty; give at least one", param="messages")
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": _texts("system", self.system)})
        for i, message in enumerate(self.messages):
            messages += _turn(f"messages[{i}]", message)
        last = messages[-1]
        goes_on = last["role"] == "assistant" and not last.get("tool_calls")
        return ChatRequest(
            model=self.model, messages=messages, continue_final_message=goes_on or None,
            chat_template_kwargs=self.chat_template_kwargs, **more,
        )  # fmt: skip


class MessagesRequest(CountRequest, kw_only=True):
    """Body of POST /v1/messages: Anthropic's fields, and some that chat has too.  None is "not given"."""

    max_tokens: int | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None
    # as in chat
    seed: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    weft: Own | None = None

    def chat_request(self) -> ChatRequest:
        """Raises RequestError."""
        if self.max_tokens is None:
            raise RequestError(
                "max_tokens is missing; give the most tokens that the answer may have", param="max_tokens"
            )
        same = ("temperature", "top_p", "top_k", "seed", "priority", "cache_salt", "weft")
        return self.as_chat(
            max_tokens=self.max_tokens, stop=self.stop_sequences, **{name: getattr(self, name) for name in same}
        )


# Unsupported fields that change the answer, as in `openai.structs.NEUTRAL`.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ({"type": "auto"}, {"type": "none"}),
    "thinking": ({"type": "disabled"},),
    "output_config": ({},),
    "output_format": (),
    "container": (),
    "context_management": (),
    "mcp_servers": ([],),
}


def _turn(where: str, message: Message) -> list[dict[str, Any]]:
    """The messages of chat that a turn stands for: results of tools are messages of their own, before what the user says."""
    if message.role not in ("user", "assistant"):
        raise RequestError(f"{where}.role is {message.role[:40]!r}; use user or assistant", param="messages")
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for j, block in enumerate(message.content):
        place, kind = f"{where}.content[{j}]", block.get("type")
        if kind == "tool_use" and message.role == "assistant":
            calls.append(_call(place, block))
        elif kind == "tool_result" and message.role == "user":
            text = _texts(f"{place}.content", block.get("content") or "")
            results.append({"role": "tool", "tool_call_id": _text(place, block, "tool_use_id"), "content": text})
        else:
            texts.append(_text_block(place, block))
    told = "\n".join(texts)
    if calls:
        return [{"role": "assistant", "content": told or None, "tool_calls": calls}]
    return [*results, *([{"role": message.role, "content": told}] if texts or not results else [])]


def _call(where: str, block: dict[str, Any]) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}.input must be an object", param="messages")
    function = {"name": _text(where, block, "name"), "arguments": msgspec.json.encode(arguments).decode()}
    return {"id": _text(where, block, "id"), "type": "function", "function": function}


def _texts(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be text, or a list of text blocks", param=where.partition("[")[0])
    return "\n".join(_text_block(f"{where}[{i}]", block) for i, block in enumerate(content))


def _text_block(where: str, block: Any) -> str:
    """The text of a block.  Nothing is ever fetched: a block that names an image, a document or an address is refused."""
    kind = block.get("type") if isinstance(block, dict) else type(block).__name__
    if kind != "text":
        raise RequestError(f"{where}: only text blocks are supported, not {str(kind)[:40]!r}", param="messages")
    return _text(where, block, "text")


def _text(where: str, block: dict[str, Any], name: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be a string", param="messages")
    return value
