"""POST /v1/chat/completions: messages through the model's template, then like any prompt.

Source of the shapes: OpenAI's API reference, "Chat Completions"; `stop_reason` and the extra fields are vLLM's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec

from weft.errors import RequestError
from weft.front.generation import Delta, Generation, Prompt
from weft.front.openai.answer import JSONAnswer, StreamAnswer
from weft.front.openai.logprobs import chat_logprobs
from weft.front.openai.offer import check_calls, offer_of
from weft.front.openai.own import deadline, label, techniques
from weft.front.openai.params import routing, sampling_params
from weft.front.openai.service import Service, answer_id
from weft.front.openai.structs import ChatRequest, TokenizeRequest, read
from weft.front.openai.turn import Turn
from weft.front.speech import Manner
from weft.front.template import plain_messages
from weft.front.timeline import said
from weft.types import TokenLogprob

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Roles, and as what the template sees them: `developer` is OpenAI's newer word for `system`."""
encode = msgspec.json.encode


async def chat(service: Service, body: bytes) -> JSONAnswer | StreamAnswer:
    """Start what a request asks for.  Raises RequestError."""
    request = read(body, ChatRequest, lenient=service.lenient)
    model, prompt = await chat_prompt(service, request)
    generation = await service.start(request, prompt)
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
    ids, manner = await chat_turn(service, request)
    if manner is not None and manner.grammar is not None:
        params = replace(params, structured_outputs={"grammar": manner.grammar})
    parts = techniques(request, service.port.info.stack, service.techniques(model), params.grammar)
    beside = await contrast(service, request)
    prompt = Prompt(
        ids=ids,
        params=params,
        priority=priority,
        salt=salt,
        techniques=parts,
        contrast=beside,
        manner=manner,
        ttft_s=deadline(request),
    )
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
        if message.get("tool_calls"):
            check_calls(message, where)
        elif "tool_calls" in message:
            del message["tool_calls"]
        if role == "tool" and not isinstance(message.get("tool_call_id", ""), str):
            raise RequestError(f"{where}.tool_call_id must be the id of a call", param="messages")
        if message.get("content") is None and message.get("tool_calls"):
            message["content"] = ""  # templates look into it
        if message.get("content") is None:
            raise RequestError(f"{where}.content is missing; give text", param="messages")
        if message.get("function_call") is not None or message.get("audio") is not None:
            raise RequestError(f"{where}: function_call and audio are not supported; leave them out", param="messages")
    return checked


async def chat_ids(service: Service, request: ChatRequest | TokenizeRequest) -> list[int]:
    """Token ids of a request's messages, as the model's template puts them.  Raises RequestError."""
    return (await chat_turn(service, request))[0]


async def chat_turn(service: Service, request: ChatRequest | TokenizeRequest) -> tuple[list[int], Manner | None]:
    """(ids of the prompt, how answers to it are to be read) of a request's messages and tools.  Raises RequestError."""
    held_to = request.grammar if isinstance(request, ChatRequest) else None
    text, offer, dialect = service.text, offer_of(request), service.dialect_of(request.chat_template)
    messages = checked_messages(request.messages)
    going_on = bool(request.continue_final_message)
    add_prompt = (not going_on) if request.add_generation_prompt is None else request.add_generation_prompt
    if going_on and add_prompt:
        raise RequestError(
            "add_generation_prompt and continue_final_message exclude each other; set one of them",
            param="continue_final_message",
        )

    def work() -> tuple[list[int], Manner | None]:
        given, tools = dialect.conversation(messages, offer.tools)
        whole = dialect.template.render(
            given, tools=tools, add_generation_prompt=add_prompt, kwargs=request.chat_template_kwargs
        )
        if going_on:
            whole = _open_ended(whole, messages[-1])
        ids = text.prompt_ids(whole, add_special=bool(request.add_special_tokens), param="messages")
        manner = dialect.manner(
            whole,
            offer.functions,
            parallel=offer.parallel,
            required=offer.choice == "required",
            strict=offer.strict,
            room=_room(request, service.port.info.max_model_len - len(ids)),
            answer=held_to,
            goes_on=messages[-1]["content"] if going_on else None,
        )
        return ids, manner

    return await service.in_thread(work)  # the template runs in a process of its own, which may take its time


def _room(request: ChatRequest | TokenizeRequest, left: int) -> int:
    """Tokens that an answer may have.  left: what the context leaves."""
    if isinstance(request, TokenizeRequest):
        return left
    asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    return left if asked is None else max(min(asked, left), 1)


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
        self._generation = generation
        self._n = n
        manner = generation.requests[0].prompt.manner
        self._turns = [] if manner is None else [Turn(manner) for _ in range(n)]
        self._thinks = manner is not None and manner.marks is not None
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
        self._content_heads = [self._head + b'%d,"delta":{"content":' % i for i in range(n)]
        self._choices: dict[int, _Choice] = {}
        self._label = label(
            request, service.port.info.stack, service.techniques(model), generation.requests[0].prompt.params.grammar
        )
        self._last_head = start + b',"choices":[],'

    # ------------------------------------------------------------------------------------------ stream

    def open(self) -> bytes:
        delta = b',"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null'
        return b"".join(self._head + b"%d" % i + delta + self._tail for i in range(self._n))

    def events(self, deltas: list[Delta]) -> bytes:
        out: list[bytes] = []
        for delta in deltas:
            reason: str | None = delta.finish_reason
            if self._turns:
                turn = self._turns[delta.index]
                out += self._pieces(delta, turn.read(delta))
                reason = turn.reason(delta)
            elif delta.text or (self._logprobs and delta.logprobs):
                logprobs = self._encoded_logprobs(delta)
                head = self._content_heads[delta.index]
                out += (head, encode(delta.text), b'},"logprobs":', logprobs, b',"finish_reason":null', self._tail)
            if reason is not None:
                why = encode(reason), b',"stop_reason":', encode(delta.stop_reason)
                head = self._head + b"%d" % delta.index
                out += (head, b',"delta":{},"logprobs":null,"finish_reason":', *why, self._tail)
        return b"".join(out)

    def _pieces(self, delta: Delta, pieces: list[dict[str, Any]]) -> Iterator[bytes]:
        """Chunks of what an answer with thoughts or calls says; the first carries the log-probabilities of them all."""
        logprobs = self._encoded_logprobs(delta)
        for piece in pieces or ([{}] if self._logprobs and delta.logprobs else []):
            yield self._head + b'%d,"delta":' % delta.index
            yield from (encode(piece), b',"logprobs":', logprobs, b',"finish_reason":null', self._tail)
            logprobs = b"null"

    def _encoded_logprobs(self, delta: Delta) -> bytes:
        if not self._logprobs:
            return b"null"
        return encode(chat_logprobs(self._service.text.tokenizer, delta.logprobs))

    def _counted(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The usage, with the tokens of thoughts where the model's are told apart."""
        if not self._thinks:
            return usage
        sequences = self._generation.requests[0].sequences
        tokens = sum(turn.thought_tokens(s.text.offsets) for turn, s in zip(self._turns, sequences, strict=False))
        return {**usage, "completion_tokens_details": {"reasoning_tokens": tokens}}

    def close(self, usage: dict[str, Any]) -> bytes:
        counted = {"usage": self._counted(usage)} if self._with_usage else {}
        last = {**counted, **said(self._label, self._generation)}
        return self._last_head + encode(last)[1:] + b"\n\n" if last else b""

    # ------------------------------------------------------------------------------------------ one body

    def gather(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            choice = self._choices.setdefault(delta.index, _Choice())
            if self._turns:
                self._turns[delta.index].gather(delta)
            else:
                choice.text.append(delta.text)
            choice.logprobs += delta.logprobs
            if delta.finish_reason is not None:
                choice.last = delta

    def body(self, usage: dict[str, Any]) -> bytes:
        choices = []
        for index, choice in sorted(self._choices.items()):
            logprobs = chat_logprobs(self._service.text.tokenizer, choice.logprobs) if self._logprobs else None
            turn, last = self._turns[index] if self._turns else None, choice.last
            message = (
                {"role": "assistant", "content": "".join(choice.text), "refusal": None}
                if turn is None
                else turn.message()
            )
            reason = None if last is None else last.finish_reason if turn is None else turn.reason(last)
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": reason,
                    "stop_reason": last and last.stop_reason,
                }
            )
        own = said(self._label, self._generation)
        return encode({**self._common, "choices": choices, "usage": self._counted(usage), **own})


class _Choice:
    def __init__(self) -> None:
        self.text: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.last: Delta | None = None
