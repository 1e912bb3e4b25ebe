"""POST /v1/completions: text, or token ids, continued.

Source of the shapes: OpenAI's API reference, "Completions"; `stop_reason` and the extra sampling fields are vLLM's.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from weft.errors import RequestError
from weft.front.generation import Delta, Generation, Prompt
from weft.front.openai.answer import JSONAnswer, StreamAnswer
from weft.front.openai.logprobs import CompletionLogprobs, completion_logprobs, completion_token, token_offsets
from weft.front.openai.own import deadline, label, techniques
from weft.front.openai.params import check_sequences, routing, sampling_params
from weft.front.openai.service import SHORT_CHARS, Service, answer_id
from weft.front.openai.structs import CompletionRequest, read
from weft.front.timeline import said

DEFAULT_MAX_TOKENS = 16
encode = msgspec.json.encode


async def complete(service: Service, body: bytes) -> JSONAnswer | StreamAnswer:
    """Start what a request asks for.  Raises RequestError."""
    request = read(body, CompletionRequest, lenient=service.lenient)
    model = service.resolve(request.model)
    prompts = prompt_list(request.prompt)
    hide = bool(request.echo) and request.max_tokens == 0  # to score a prompt: one token is made, and not shown
    params = sampling_params(
        service.text,
        request,
        max_tokens=DEFAULT_MAX_TOKENS if request.max_tokens is None else 1 if hide else request.max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
    )
    priority, salt = routing(request)
    check_sequences(len(prompts), max(params.n, request.drawn))
    parts = techniques(request, service.port.info.stack, service.techniques(model))
    due, special = deadline(request), request.add_special_tokens is not False
    ids = await tokenize(service, prompts, add_special=special)
    beside = await contrast(service, request, add_special=special)
    generation = await service.start(
        request,
        [
            Prompt(ids=one, params=params, priority=priority, salt=salt, techniques=parts, contrast=beside, ttft_s=due)
            for one in ids
        ],
    )
    writer = CompletionWriter(service, model, generation, request, prompts, hide=hide)
    return (StreamAnswer if request.stream else JSONAnswer)(generation, writer)


async def contrast(service: Service, request: CompletionRequest, *, add_special: bool) -> list[int]:
    """Ids of the prompt to contrast with, none where there is none.  Raises RequestError."""
    given = request.weft and request.weft.contrast
    if not given:
        return []
    if not isinstance(given, str):
        raise RequestError("weft.contrast of a completion is a text, as its prompt is", param="weft.contrast")
    return (await tokenize(service, [given], add_special=add_special))[0]


def prompt_list(prompt: str | list[str | int | list[int]] | None) -> list[str | list[int]]:
    """The prompts of a request: each a text or a list of ids.  Raises RequestError for none, empty ones, mixtures."""
    if prompt is None or prompt == "" or prompt == []:
        raise RequestError("prompt is missing or empty; give text or token ids", param="prompt", code="empty_prompt")
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(one) for one in prompt}
    if len(kinds) > 1:
        raise RequestError("prompt mixes texts, ids and lists of ids; use one kind", param="prompt")
    if kinds == {int}:
        return [[one for one in prompt if isinstance(one, int)]]
    found = [one for one in prompt if not isinstance(one, int)]
    if not all(found):
        raise RequestError(
            f"prompt {next(i for i, one in enumerate(found) if not one)} of {len(found)} is empty; leave it out",
            param="prompt",
            code="empty_prompt",
        )
    return found


async def tokenize(service: Service, prompts: list[str | list[int]], *, add_special: bool) -> list[list[int]]:
    """Token ids of prompts, those given as ids unchanged.  Raises RequestError for what the model can't take."""
    text = service.text
    chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))

    def work() -> list[list[int]]:
        return [text.prompt_ids(one, add_special=add_special) if isinstance(one, str) else one for one in prompts]

    return work() if chars <= SHORT_CHARS else await service.in_thread(work)


class CompletionWriter:
    """Deltas as `text_completion` objects.  Choice i is sequence i of the generation: all n of a prompt together."""

    def __init__(
        self,
        service: Service,
        model: str,
        generation: Generation,
        request: CompletionRequest,
        prompts: list[str | list[int]],
        *,
        hide: bool,
    ) -> None:
        self._service = service
        self._generation = generation
        self._prompts = prompts
        self._n = request.n or 1
        self._echo = bool(request.echo)
        self._hide = hide
        self._logprobs = request.logprobs is not None
        self._with_usage = request.include_usage
        self._common = {
            "id": answer_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": service.fingerprint(model),
        }
        start = b"data: " + encode(self._common)[:-1]
        self._head = start + b',"choices":[{"index":'
        self._tail = b'}],"usage":null}\n\n' if self._with_usage else b"}]}\n\n"
        self._label = label(request, service.port.info.stack, service.techniques(model))
        self._last_head = start + b',"choices":[],'
        self._begun: dict[int, str] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._hidden = 0

    # ------------------------------------------------------------------------------------------ stream

    def open(self) -> bytes:
        return b""

    def events(self, deltas: list[Delta]) -> bytes:
        out = []
        for delta in deltas:
            text, logprobs = self._content(delta)
            head = self._head + b"%d" % delta.index
            if text or logprobs is not None:
                parts = (head, b',"text":', encode(text), b',"logprobs":', encode(logprobs), b',"finish_reason":null')
                out += [*parts, self._tail]
            if delta.finish_reason is not None:
                reason = encode(self._reason(delta)), b',"stop_reason":', encode(delta.stop_reason)
                out += [head, b',"text":"","logprobs":null,"finish_reason":', *reason, self._tail]
        return b"".join(out)

    def close(self, usage: dict[str, Any]) -> bytes:
        counted = {"usage": self._count(usage)} if self._with_usage else {}
        last = {**counted, **said(self._label, self._generation)}
        return self._last_head + encode(last)[1:] + b"\n\n" if last else b""

    # ------------------------------------------------------------------------------------------ one body

    def gather(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            text, logprobs = self._content(delta)
            choice = self._choices.get(delta.index)
            if choice is None:
                choice = self._choices[delta.index] = {
                    "index": delta.index,
                    "text": [],
                    "logprobs": CompletionLogprobs() if self._logprobs else None,
                }
            choice["text"].append(text)
            if logprobs is not None:
                choice["logprobs"].extend(logprobs)
            if delta.finish_reason is not None:
                choice["finish_reason"] = self._reason(delta)
                choice["stop_reason"] = delta.stop_reason

    def body(self, usage: dict[str, Any]) -> bytes:
        choices = [self._choices[index] for index in sorted(self._choices)]
        for choice in choices:
            choice["text"] = "".join(choice["text"])
        own = said(self._label, self._generation)
        return encode({**self._common, "choices": choices, "usage": self._count(usage), **own})

    # ------------------------------------------------------------------------------------------ both

    def _content(self, delta: Delta) -> tuple[str, CompletionLogprobs | None]:
        """Text and logprobs of a delta, those of an echoed prompt before the first."""
        tokenizer = self._service.text.tokenizer
        prefix = self._begun.get(delta.index)
        first = prefix is None
        if prefix is None:
            prefix = self._begun[delta.index] = self._echoed(delta.index // self._n)
        if self._hide:
            self._hidden += len(delta.token_ids)
            text, logprobs = "", CompletionLogprobs() if self._logprobs else None
        else:
            text, logprobs = delta.text, None
            if self._logprobs and (delta.logprobs or first):
                offsets = [len(prefix) + offset for offset in delta.offsets]
                logprobs = completion_logprobs(tokenizer, delta.logprobs, offsets)
        if first and self._echo:
            text = prefix + text
            if logprobs is not None:
                before = self._prompt_logprobs(delta.index // self._n)
                before.extend(logprobs)
                logprobs = before
        return text, logprobs

    def _echoed(self, index: int) -> str:
        if not self._echo:
            return ""
        prompt = self._prompts[index]
        return prompt if isinstance(prompt, str) else self._service.text.tokenizer.decode(prompt)

    def _prompt_logprobs(self, index: int) -> CompletionLogprobs:
        """Of an echoed prompt; its first token has none."""
        request, tokenizer = self._generation.requests[index], self._service.text.tokenizer
        ids = list(request.prompt.ids)
        offsets = token_offsets(tokenizer, ids)
        rest = completion_logprobs(tokenizer, request.prompt_logprobs, offsets[1:])
        whole = CompletionLogprobs([offsets[0]], [None], [completion_token(tokenizer, ids[0])], [None])
        whole.extend(rest)
        return whole

    def _reason(self, delta: Delta) -> str | None:
        return "length" if self._hide else delta.finish_reason

    def _count(self, usage: dict[str, Any]) -> dict[str, Any]:
        completion = usage["completion_tokens"] - self._hidden
        return {**usage, "completion_tokens": completion, "total_tokens": usage["prompt_tokens"] + completion}
