"""Items of the Responses API and messages of a chat: what a client gives, what is kept, and what the template sees."""

from __future__ import annotations

from typing import Any

from weft.errors import RequestError
from weft.front.openai.calls import fresh_id
from weft.front.template import kind_of

ROLES = ("user", "assistant", "system", "developer")
MAX_ITEMS = 4096
STATUSES = ("in_progress", "completed", "incomplete")


def input_items(given: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """A request's input as items with ids.  Raises RequestError naming the item that is wrong."""
    if given is None or given == "" or given == []:
        raise RequestError("input is missing or empty; give text or items", param="input", code="empty_prompt")
    if isinstance(given, str):
        return [_message("user", [{"type": "input_text", "text": given}])]
    if len(given) > MAX_ITEMS:
        raise RequestError(f"input: at most {MAX_ITEMS} items, got {len(given)}", param="input")
    return [_item(f"input[{i}]", item) for i, item in enumerate(given)]


def messages_of(instructions: str | None, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation as chat messages; tool calls that follow each other belong to one message of the assistant, and so does
    what it thought before."""
    messages: list[dict[str, Any]] = []
    thought = ""
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        if item["type"] == "reasoning":
            thought += "".join(part["text"] for part in item["content"])
            continue
        messages += _message_of(item, messages[-1] if messages else {})
        if thought and messages and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"], thought = thought, ""
    return messages


def _message_of(item: dict[str, Any], last: dict[str, Any]) -> list[dict[str, Any]]:
    """The message of an item; none where it goes into the last one."""
    if item["type"] == "function_call_output":
        return [{"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}]
    if item["type"] != "function_call":
        return [{"role": item["role"], "content": "\n".join(part["text"] for part in item["content"])}]
    function = {"name": item["name"], "arguments": item["arguments"]}
    call = {"id": item["call_id"], "type": "function", "function": function}
    if last.get("role") == "assistant":
        last.setdefault("tool_calls", []).append(call)
        return []
    return [{"role": "assistant", "content": None, "tool_calls": [call]}]


def text_part(text: str, logprobs: list[Any]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _message(role: str, content: list[dict[str, Any]], id: str | None = None) -> dict[str, Any]:
    return {"id": id or fresh_id("msg_"), "type": "message", "role": role, "status": "completed", "content": content}


def _item(where: str, item: dict[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role not in ROLES:
            raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}", param="input")
        return _message(role, _content(f"{where}.content", role, item.get("content")))
    if kind == "function_call":
        texts = {name: _text(f"{where}.{name}", item.get(name)) for name in ("call_id", "name", "arguments")}
        return {"id": fresh_id("fc_"), "type": kind, "status": "completed", **texts}
    if kind == "reasoning":
        parts = item.get("content") or []
        thoughts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
        kept = [{"type": "reasoning_text", "text": text} for text in thoughts if isinstance(text, str)]
        return {"id": fresh_id("rs_"), "type": kind, "status": "completed", "summary": [], "content": kept}
    if kind == "function_call_output":
        output = item.get("output")
        if isinstance(output, list):
            output = "\n".join(_part(f"{where}.output[{i}]", part) for i, part in enumerate(output))
        return {
            "id": fresh_id("fco_"), "type": kind, "status": "completed",
            "call_id": _text(f"{where}.call_id", item.get("call_id")), "output": _text(f"{where}.output", output),
        }  # fmt: skip
    raise RequestError(
        f"{where} is of type {str(kind)[:40]!r}; weft reads message, reasoning, function_call and function_call_output",
        param="input",
    )


def _content(where: str, role: str, content: Any) -> list[dict[str, Any]]:
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise RequestError(f"{where} must be text, or a list of text parts", param="input")
    texts = [part if isinstance(part, str) and part is content else _part(f"{where}[{i}]", part)
             for i, part in enumerate(parts)]  # fmt: skip
    if role == "assistant":
        return [text_part(text, []) for text in texts]
    return [{"type": "input_text", "text": text} for text in texts]


def _part(where: str, part: Any) -> str:
    """The text of a part.  Nothing is ever fetched: a part that names an image, a file or an address is refused."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if not isinstance(part, dict) or kind not in ("input_text", "output_text", "text"):
        raise RequestError(f"{where}: only text parts are supported, not {kind_of(part)!r}", param="input")
    return _text(f"{where}.text", part.get("text"))


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where} must be a string", param="input")
    return value
