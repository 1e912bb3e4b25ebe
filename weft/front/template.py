"""`ChatTemplate`: a conversation to the text that the model was trained on, by the checkpoint's own jinja2 template.

The rendering is that of transformers' `apply_chat_template`; for where and under which limits it runs see
`template_worker`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import ConfigError, RequestError
from weft.front.files import read_json, read_text
from weft.front.renderer import Renderer, shared_renderer

if TYPE_CHECKING:
    from weft.front.tokenizer import Tokenizer

MAX_MESSAGES = 16384
MAX_TEMPLATE_CHARS = 1 << 20

KWARGS = (
    "add_vision_id",
    "builtin_tools",
    "citations",
    "custom_tools",
    "date_string",
    "enable_thinking",
    "model_identity",
    "preserve_thinking",
    "python_tools",
    "reasoning_effort",
    "thinking",
    "thinking_budget",
    "tools_in_user_message",
    "xml_tools",
)
"""Template arguments that any client may send to any model; others only where the template reads them."""

_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """The chat templates of one checkpoint.

    templates  by name: "default", and where the checkpoint has them "tool_use", "rag" and so on; {} where it has none
    variables  special tokens that templates may write: {"bos_token": "<s>", ...}
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        variables: Mapping[str, str] | None = None,
        *,
        renderer: Renderer | None = None,
        name: str = "this model",
    ) -> None:
        self.templates = dict(templates)
        self.variables = dict(variables or {})
        self.name = name
        self._renderer = renderer or shared_renderer()

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Tokenizer, *, name: str = "this model") -> ChatTemplate:
        """The templates of the checkpoint in `folder`; the first of these that it has wins.

        chat_template.jinja (with additional_chat_templates/NAME.jinja), chat_template.json, and chat_template in
        tokenizer_config.json, which is one template or a list of named ones.
        """
        folder = Path(folder)
        templates = _named(tokenizer.config.get("chat_template"), folder / "tokenizer_config.json")
        path = folder / "chat_template.json"
        templates |= _named(read_json(path).get("chat_template"), path)
        if (folder / "chat_template.jinja").is_file():
            templates["default"] = read_text(folder / "chat_template.jinja")
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            templates[path.stem] = read_text(path)
        for label, source in templates.items():
            if len(source) > MAX_TEMPLATE_CHARS:
                raise ConfigError(f"{folder}: chat template {label!r} has {len(source)} characters; that is too long")
        template = cls(templates, tokenizer.special_tokens, name=name)
        if templates:
            template._renderer.start()
        return template

    def __bool__(self) -> bool:
        return bool(self.templates)

    def replaced(self, source: str) -> ChatTemplate:
        """The same model with another template."""
        return ChatTemplate({"default": source}, self.variables, renderer=self._renderer, name=self.name)

    def sources(self) -> list[str]:
        """Every template, the one for tools first, then the default."""
        return [
            self.templates[name] for name in sorted(self.templates, key=lambda n: (n != "tool_use", n != "default", n))
        ]

    def source(self, tools: Sequence[Any] | None = None) -> str:
        """The template for a conversation with or without tools.  RequestError where the model has none."""
        if not self.templates:
            raise RequestError(
                f"{self.name} has no chat template; use /v1/completions with a prompt of your own making",
                code="no_chat_template",
            )
        if tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" in self.templates:
            return self.templates["default"]
        if len(self.templates) == 1:
            return next(iter(self.templates.values()))
        names = ", ".join(sorted(self.templates))
        raise RequestError(f"{self.name} has chat templates {names}, and none is the default", code="no_chat_template")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text.  Messages go to the template as they are; see `plain_messages` for what a client sends.

        continue_final_message: the text ends inside the last message, which the model then goes on with.
        kwargs: `chat_template_kwargs`.  Blocks for as long as the template runs, at most the renderer's limit.
        Raises RequestError: no template, the template refuses the conversation or fails, it runs or grows too long.
        """
        source = self.source(tools)
        given = dict(kwargs or {})
        mark = f"<{secrets.token_hex(16)}>" if continue_final_message else ""
        plain = [_with_reasoning(m) for m in messages]
        if continue_final_message:
            _mark_end(plain, mark)
        context: dict[str, Any] = {
            **self.variables,
            "messages": plain,
            "tools": list(tools) if tools is not None else None,
            "documents": list(documents) if documents is not None else None,
            "add_generation_prompt": add_generation_prompt,
        }
        for key in given:
            if not isinstance(key, str) or not key.isidentifier() or key in context or key.startswith("_"):
                raise RequestError(
                    f"chat_template_kwargs: {key!r} cannot be set; it is not an argument of a chat template",
                    param="chat_template_kwargs",
                )
        reply = self._renderer.render(source, context, given, list(KWARGS))
        if "text" not in reply:
            raise self._error(reply)
        text: str = reply["text"]
        return _cut_at(text, mark, self.name) if continue_final_message else text

    def _error(self, reply: dict[str, Any]) -> RequestError:
        kind, message, limits = reply["error"], reply["message"], self._renderer
        if kind == "kwargs":
            names = ", ".join([*reply["names"], *KWARGS])
            text = f"chat_template_kwargs: {self.name}'s template does not read {message}; it may be given {names}"
            return RequestError(text, param="chat_template_kwargs")
        texts = {
            "refused": f"{self.name}'s chat template refuses the conversation: {message}",
            "template": f"{self.name}'s chat template fails on this conversation ({message}); change the messages, "
            "or use /v1/completions",
            "size": f"{self.name}'s chat template wrote more than {limits.max_chars} characters; shorten the messages",
            "time": f"{self.name}'s chat template took longer than {limits.seconds:g} s and was stopped",
            "memory": f"{self.name}'s chat template needed more than {limits.memory_bytes >> 20} MiB and was stopped",
        }
        text = texts.get(kind, f"the process that renders chat templates ended ({message}); try again")
        return RequestError(text, param="messages", code="chat_template_error")


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """A client's messages, checked, in the form that templates expect.

    Text parts are joined by newlines, as vLLM and llama.cpp do; parts of another kind are refused.  Arguments of tool
    calls, which OpenAI's API writes as JSON text, become objects.  RequestError says which message is wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("messages must be a list with at least one message", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"messages: {len(messages)} are too many; at most {MAX_MESSAGES}", param="messages")
    return [_plain_message(i, message) for i, message in enumerate(messages)]


def _plain_message(index: int, message: Any) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content", param="messages")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where}.role must be a string such as 'user'", param="messages")
    plain = dict(message)
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        plain["content"] = "\n".join(_part_text(f"{where}.content[{j}]", part) for j, part in enumerate(content))
    elif content is not None and not isinstance(content, str):
        raise RequestError(f"{where}.content must be a string or a list of text parts", param="messages")
    elif content is None and role != "assistant":
        raise RequestError(f"{where}.content is missing", param="messages")
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise RequestError(f"{where}.tool_calls must be a list", param="messages")
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    return plain


def _part_text(where: str, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    raise RequestError(f"{where}: only text parts are supported, not {kind_of(part)!r}", param="messages")


JSON_TYPES = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array"}


def kind_of(part: Any) -> str:
    """Which type a part of a message names, or is of, in a few characters."""
    named = part.get("type") if isinstance(part, Mapping) else JSON_TYPES.get(type(part), "object")
    return "null" if named is None else str(named)[:40]


def _plain_call(call: Any) -> Any:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"] or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if isinstance(arguments, dict):
            function["arguments"] = arguments
    return {**call, "function": function}


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Reasoning under the two names that templates read, whichever of three the client used (transformers 5.23)."""
    plain = dict(message)
    reasoning = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
    if reasoning is None:
        return plain
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _mark_end(messages: list[dict[str, Any]], mark: str) -> None:
    """Put `mark` and a space behind the last message's text, where the prompt is to be cut."""
    content = messages[-1].get("content") if messages else None
    if not isinstance(content, str):
        raise RequestError("continue_final_message needs a last message with text", param="continue_final_message")
    messages[-1]["content"] = content + mark + " "


def _cut_at(text: str, mark: str, name: str) -> str:
    """What stands before the mark; stripped too where the template strips the message (it has eaten the space)."""
    at = text.rfind(mark)
    if at < 0:
        raise RequestError(
            f"{name}'s chat template does not end with the last message's text, so it cannot be continued",
            param="continue_final_message",
        )
    return text[:at] if text.startswith(mark + " ", at) else text[:at].rstrip()


def _named(value: Any, path: Path) -> dict[str, str]:
    """{name: template} from a configuration's chat_template."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        named = {item["name"]: item["template"] for item in value}
    except (TypeError, KeyError) as e:
        raise ConfigError(f"{path}: chat_template must be text or a list of {{name, template}}") from e
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in named.items()):
        raise ConfigError(f"{path}: chat_template must be text or a list of {{name, template}}")
    return named
