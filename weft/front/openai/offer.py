"""`Offer`: the tools of a request and what is said of their use: `tools`, `tool_choice`, `parallel_tool_calls`, checked.

Source of the shapes: OpenAI's API reference, "Chat Completions".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from weft.errors import RequestError
from weft.front.tools.machine import MAX_NAME, NAME_CHARS

MAX_TOOLS = 128
"""OpenAI's bound."""
MAX_SCHEMA_DEPTH = 64

Choice = Literal["none", "auto", "required"]


class Asks(Protocol):
    """The fields of a request that an offer is made from."""

    tools: list[dict[str, Any]] | None
    tool_choice: str | dict[str, Any] | None
    parallel_tool_calls: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """tools: what the prompt tells of.  functions: what may be called, with the schema of its parameters.

    choice: whether a call may come, or must.  parallel: whether several may; a function that is named is called once.
    strict: whether calls must be right even where none must come: one of the functions says so.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    functions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    choice: Choice = "none"
    parallel: bool = True
    strict: bool = False


def offer_of(request: Asks) -> Offer:
    """Raises RequestError naming what is wrong."""
    functions = _functions(request.tools or [])
    tools = [_plain(tool) for tool in request.tools or []]
    given = request.tool_choice
    if not functions:
        if given not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools: give the functions that may be called", param="tool_choice")
        return Offer()
    if given is None or isinstance(given, str):
        choice, allowed = given or "auto", None
    else:
        choice, allowed = _object_choice(given)
    if choice not in ("none", "auto", "required"):
        raise RequestError(
            f"tool_choice is none, auto, required, or an object that names a function, not {choice[:40]!r}",
            param="tool_choice",
        )
    if choice == "none":
        return Offer()
    for name in allowed or ():
        if name not in functions:
            raise RequestError(f"tool_choice names {name[:80]!r}, which is none of the tools", param="tool_choice")
    named = isinstance(given, Mapping) and given.get("type") == "function"
    kept = functions if allowed is None else {name: functions[name] for name in allowed}
    return Offer(
        tools=tools,
        functions=kept,
        choice="required" if choice == "required" else "auto",
        parallel=request.parallel_tool_calls is not False and not named,
        strict=any(tool["function"].get("strict") is True for tool in tools if tool["function"]["name"] in kept),
    )


def _object_choice(given: Mapping[str, Any]) -> tuple[str, list[str] | None]:
    """(choice, the only functions that may be called) of a tool_choice that is an object."""
    kind = given.get("type")
    if kind == "function":
        return "required", [_name(given, "tool_choice")]
    inner = given.get("allowed_tools")
    if kind == "allowed_tools" and isinstance(inner, Mapping) and isinstance(inner.get("tools"), list):
        names = [_name(tool, f"tool_choice.allowed_tools.tools[{i}]") for i, tool in enumerate(inner["tools"])]
        if names and inner.get("mode") in ("auto", "required"):
            return str(inner["mode"]), names
    raise RequestError(
        'tool_choice as an object is {"type": "function", "function": {"name": ...}}, or allowed_tools with a mode and tools',
        param="tool_choice",
    )


def _functions(tools: Sequence[Any]) -> dict[str, Mapping[str, Any]]:
    """Schemas of parameters by the names of functions."""
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools: {len(tools)} are too many; at most {MAX_TOOLS}", param="tools")
    functions: dict[str, Mapping[str, Any]] = {}
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise RequestError(
                f"{where} must be an object of type function; weft has no tools of its own", param="tools"
            )
        name = _name(tool, where)
        if name in functions:
            raise RequestError(f"{where}: there is another function {name!r}; names must differ", param="tools")
        functions[name] = _parameters(tool["function"].get("parameters"), f"{where}.function.parameters")
        description = tool["function"].get("description")
        if description is not None and not isinstance(description, str):
            raise RequestError(f"{where}.function.description must be text", param="tools")
    return functions


def _name(tool: Any, where: str) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not NAME_CHARS.issuperset(name):
        raise RequestError(
            f"{where}.function.name must be text of at most {MAX_NAME} letters, digits, and any of _ - . :",
            param=where.partition("[")[0].partition(".")[0],
        )
    return name


def _parameters(schema: Any, where: str) -> Mapping[str, Any]:
    if schema is None:
        return {"type": "object", "properties": {}}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise RequestError(f"{where} must be a JSON schema of type object", param="tools")
    if not isinstance(schema.get("properties", {}), Mapping):
        raise RequestError(f"{where}.properties must be an object", param="tools")
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [inner for one in level for inner in (one.values() if isinstance(one, Mapping) else one)
                 if isinstance(inner, Mapping | list)]  # fmt: skip
        if not level:
            return schema
    raise RequestError(f"{where} is nested more than {MAX_SCHEMA_DEPTH} deep; flatten it", param="tools")


def _plain(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool without the keys that say nothing."""
    function = {key: value for key, value in tool["function"].items() if value is not None}
    return {"type": "function", "function": function}


def check_calls(message: dict[str, Any], where: str) -> None:
    """The `tool_calls` of a message of the assistant's: what templates need is there.  Raises RequestError."""
    for i, call in enumerate(message["tool_calls"]):
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name or not isinstance(call.get("id"), str):
            raise RequestError(
                f"{where}.tool_calls[{i}] must have an id and a function with a name and arguments", param="messages"
            )
