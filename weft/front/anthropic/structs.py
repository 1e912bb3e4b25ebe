"""Bodies of POST /v1/messages and /v1/messages/count_tokens, and the chat request that says the same.

Source of the shapes: Anthropic's API reference, "Messages".
"""

from __future__ import annotations

from typing import Any

import msgspec

from weft.errors import RequestError
from weft.front.openai.structs import ChatRequest, JSONSchema, Own, ResponseFormat
from weft.front.template import kind_of

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
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
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
        choice, parallel = _choice(self.tool_choice)
        return ChatRequest(
            model=self.model, messages=messages, continue_final_message=goes_on or None,
            chat_template_kwargs=self.chat_template_kwargs, tool_choice=choice, parallel_tool_calls=parallel,
            tools=None if self.tools is None else [_tool(i, tool) for i, tool in enumerate(self.tools)], **more,
        )  # fmt: skip


class MessagesRequest(CountRequest, kw_only=True):
    """Body of POST /v1/messages: Anthropic's fields, and some that chat has too.  None is "not given"."""

    max_tokens: int | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None
    output_config: dict[str, Any] | None = None
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
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            response_format=_format(self.output_config),
            **{name: getattr(self, name) for name in same},
        )


# Unsupported fields that change the answer, as in `openai.structs.NEUTRAL`.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "thinking": ({"type": "disabled"},),
    "output_format": (),
    "container": (),
    "context_management": (),
    "mcp_servers": ([],),
}


def _tool(index: int, tool: dict[str, Any]) -> dict[str, Any]:
    """A function as chat has it.  Tools that Anthropic's servers run themselves have a type, and there are none here."""
    if tool.get("type") not in (None, "custom"):
        raise RequestError(
            f"tools[{index}] is of type {str(tool['type'])[:40]!r}; weft has no tools of its own: give input_schema",
            param="tools",
        )
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
    }
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def _choice(given: dict[str, Any] | None) -> tuple[str | dict[str, Any] | None, bool | None]:
    """(tool_choice of chat, whether several calls may come).  Raises RequestError."""
    if given is None:
        return None, None
    parallel = False if given.get("disable_parallel_tool_use") else None
    kind = given.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": given.get("name")}}, parallel
    words = {"auto": "auto", "any": "required", "none": "none"}
    if not isinstance(kind, str) or kind not in words:
        raise RequestError("tool_choice.type is auto, any, tool or none", param="tool_choice")
    return words[kind], parallel


def _format(config: dict[str, Any] | None) -> ResponseFormat | None:
    """The JSON schema that `output_config.format` holds an answer to.  Raises RequestError."""
    given = {key: value for key, value in (config or {}).items() if value is not None}
    form = given.pop("format", None)
    if given:
        raise RequestError(
            f"output_config.{next(iter(given))[:40]} is not supported; leave it out", param="output_config"
        )
    if form is None:
        return None
    if not isinstance(form, dict) or form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        text = "output_config.format is {type: json_schema, schema}"
        raise RequestError(text, param="output_config")
    return ResponseFormat(type="json_schema", json_schema=JSONSchema(schema_=form["schema"]))


def _turn(where: str, message: Message) -> list[dict[str, Any]]:
    """The messages of chat that a turn stands for: results of tools are messages of their own, before what the user says."""
    if message.role not in ("user", "assistant"):
        raise RequestError(f"{where}.role is {message.role[:40]!r}; use user or assistant", param="messages")
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for j, block in enumerate(message.content):
        place, kind = f"{where}.content[{j}]", block.get("type")
        if kind == "tool_use" and message.role == "assistant":
            calls.append(_call(place, block))
        elif kind == "tool_result" and message.role == "user":
            text = _texts(f"{place}.content", block.get("content") or "")
            results.append({"role": "tool", "tool_call_id": _text(place, block, "tool_use_id"), "content": text})
        elif kind == "thinking" and message.role == "assistant":
            thoughts.append(_text(place, block, "thinking"))
        else:
            texts.append(_text_block(place, block))
    told = "\n".join(texts)
    thought = {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
    if calls:
        return [{"role": "assistant", "content": told or None, "tool_calls": calls, **thought}]
    return [*results, *([{"role": message.role, "content": told, **thought}] if texts or not results else [])]


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
    if not isinstance(block, dict) or block.get("type") != "text":
        raise RequestError(f"{where}: only text blocks are supported, not {kind_of(block)!r}", param="messages")
    return _text(where, block, "text")


def _text(where: str, block: dict[str, Any], name: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be a string", param="messages")
    return value
