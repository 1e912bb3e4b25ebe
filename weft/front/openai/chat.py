"""POST /v1/chat/completions: messages through the model's template, then like any prompt.

Source of the shapes: OpenAI's API reference, "Chat Completions"; `stop_reason` and the extra fields are vLLM's.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from weft.errors import RequestError
from weft.front.generation import Delta, Generation, Prompt
from weft.front.openai.answer import JSONAnswer, StreamAnswer
from weft.front.openai.logprobs import chat_logprobs
from weft.front.openai.own import label, techniques
from weft.front.openai.params import routing, sampling_params
from weft.front.openai.service import Service, answer_id
from weft.front.openai.structs import ChatRequest, TokenizeRequest, read
from weft.front.template import plain_messages
from weft.types import TokenLogprob

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Roles, and as what the template sees them: `developer` is OpenAI's newer word for `system`."""
encode = msgspec.json.encode


async def chat(service: Service, body: bytes) -> JSONAnswer | StreamAnswer:
    """Start what a request asks for.  Raises RequestError."""
    request = read(body, ChatRequest)
    model, prompt = await chat_prompt(service, request)
    generation = await service.client.start(prompt)
    writer = ChatWriter(service, model, generation, request, prompt.params.n)
    return (StreamAnswer if request.stream else JSONAnswer)(generation, writer)


async def chat_prompt(service: Service, request: ChatRequest) -> tuple[str, Prompt]:
    """(the model's name, the prompt) of a conversation: what all routes that answer one have in common.  Raises RequestError."""
    model = service.resolve(request.model)
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    asked = request.max_completion_tokens
    params = sampling_params(
        service.text,
        request,
        max_tokens=asked if asked is not None else request.max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    priority, salt = routing(request)
    parts = techniques(request, service.port.info.stack, service.techniques(model))
    ids = await chat_ids(service, request)
    beside = await contrast(service, request)
    prompt = Prompt(ids=ids, params=params, priority=priority, salt=salt, techniques=parts, contrast=beside)
    return model, prompt


async def contrast(service: Service, request: ChatRequest) -> list[int]:
    """Ids of the messages to contrast with, none where there are none.  Raises RequestError."""
    given = request.weft and request.weft.contrast
    if not given:
        return []
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return await chat_ids(service, msgspec.structs.replace(request, messages=messages))


def checked_messages(messages: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Messages as templates read them.  Raises RequestError saying which one is wrong."""
    checked = plain_messages(messages)
    for i, message in enumerate(checked):
        where, role = f"messages[{i}]", message["role"]
        if role not in ROLES:  # a template writes the role as it is, so nothing else may get there
            raise RequestError(f"{where}.role is {role[:40]!r}; use one of {', '.join(ROLES)}", param="messages")
        message["role"] = ROLES[role]
        if message.get("content") is None and not message.get("tool_calls"):
            raise RequestError(f"{where}.content is missing; give text", param="messages")
        if message.get("function_call") is not None or message.get("audio") is not None:
            raise RequestError(f"{where}: function_call and audio are not supported; leave them out", param="messages")
    return checked


async def chat_ids(service: Service, request: ChatRequest | TokenizeRequest) -> list[int]:
    """Token ids of a request's messages, as the model's template puts them.  Raises RequestError."""
    text = service.text
    messages = checked_messages(request.messages)
    going_on = bool(request.continue_final_message)
    add_prompt = (not going_on) if request.add_generation_prompt is None else request.add_generation_prompt
    if going_on and add_prompt:
        raise RequestError(
            "add_generation_prompt and continue_final_message exclude each other; set one of them",
            param="continue_final_message",
        )

    def work() -> list[int]:
        whole = text.chat_text(messages, add_generation_prompt=add_prompt, kwargs=request.chat_template_kwargs)
        if going_on:
            whole = _open_ended(whole, messages[-1])
        return text.prompt_ids(whole, add_special=bool(request.add_special_tokens), param="messages")

    return await service.in_thread(work)  # the template runs in a process of its own, which may take its time


def _open_ended(text: str, last: dict[str, Any]) -> str:
    """The prompt cut behind the content of the last message, so that the model goes on with it."""
    content = last.get("content")
    if not isinstance(content, str) or not content.strip():
        raise RequestError("continue_final_message needs text in the last message", param="continue_final_message")
    for part in (content, content.rstrip(), content.strip()):  # some templates trim
        at = text.rfind(part)
        if at >= 0:
            return text[: at + len(part)]
    raise RequestError(
        "continue_final_message: the model's template does not write the last message as it stands; leave it out",
        param="continue_final_message",
    )


class ChatWriter:
    """Deltas as `chat.completion` and `chat.completion.chunk` objects."""

    def __init__(self, service: Service, model: str, generation: Generation, request: ChatRequest, n: int) -> None:
        self._service = service
        self._n = n
        self._logprobs = bool(request.logprobs)
        self._with_usage = request.include_usage
        self._common = {
            "id": answer_id("chatcmpl"),
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": service.fingerprint(model),
        }
        start = b"data: " + encode(self._common)[:-1]
        self._head = start + b',"choices":[{"index":'
        self._tail = b'}],"usage":null}\n\n' if self._with_usage else b"}]}\n\n"
        self._usage_head = start + b',"choices":[],"usage":'
        self._content_heads = [self._head + b'%d,"delta":{"content":' % i for i in range(n)]
        self._choices: dict[int, _Choice] = {}
        self._label = label(request, service.port.info.stack, service.techniques(model))
        self._label_event = start + b',"choices":[],"weft":' + encode(self._label) + b"}\n\n" if self._label else b""

    # ------------------------------------------------------------------------------------------ stream

    def open(self) -> bytes:
        delta = b',"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null'
        return b"".join(self._head + b"%d" % i + delta + self._tail for i in range(self._n))

    def events(self, deltas: list[Delta]) -> bytes:
        out: list[bytes] = []
        for delta in deltas:
            if delta.text or (self._logprobs and delta.logprobs):
                logprobs = (
                    encode(chat_logprobs(self._service.text.tokenizer, delta.logprobs)) if self._logprobs else b"null"
                )
                head = self._content_heads[delta.index]
                out += (head, encode(delta.text), b'},"logprobs":', logprobs, b',"finish_reason":null', self._tail)
            if delta.finish_reason is not None:
                reason = encode(delta.finish_reason), b',"stop_reason":', encode(delta.stop_reason)
                head = self._head + b"%d" % delta.index
                out += (head, b',"delta":{},"logprobs":null,"finish_reason":', *reason, self._tail)
        return b"".join(out)

    def close(self, usage: dict[str, Any]) -> bytes:
        return self._label_event + (self._usage_head + encode(usage) + b"}\n\n" if self._with_usage else b"")

    # ------------------------------------------------------------------------------------------ one body

    def gather(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            choice = self._choices.setdefault(delta.index, _Choice())
            choice.text.append(delta.text)
            choice.logprobs += delta.logprobs
            if delta.finish_reason is not None:
                choice.last = delta

    def body(self, usage: dict[str, Any]) -> bytes:
        choices = []
        for index, choice in sorted(self._choices.items()):
            logprobs = chat_logprobs(self._service.text.tokenizer, choice.logprobs) if self._logprobs else None
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
                    "logprobs": logprobs,
                    "finish_reason": choice.last and choice.last.finish_reason,
                    "stop_reason": choice.last and choice.last.stop_reason,
                }
            )
        said = {} if self._label is None else {"weft": self._label}
        return encode({**self._common, "choices": choices, "usage": usage, **said})


class _Choice:
    def __init__(self) -> None:
        self.text: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.last: Delta | None = None
