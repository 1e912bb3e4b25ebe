"""What the routes share: the engine's client, the model's text side, the names that the model answers to."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from weft.errors import ConfigError, RequestError
from weft.front.admission import Admission, Bounds
from weft.front.client import Client
from weft.front.dialect import Dialect
from weft.front.generation import Generation, Prompt
from weft.front.grammars import PARAM
from weft.front.openai.structs import Fields
from weft.front.port import EnginePort
from weft.front.template import MAX_TEMPLATE_CHARS
from weft.front.text import ModelText

if TYPE_CHECKING:
    from weft.front.openai.batch_runner import BatchRunner
    from weft.front.openai.response_run import Background
    from weft.front.store import Store

SHORT_CHARS = 2048
"""Texts up to this length are tokenized on the event loop; a thread would cost more than it saves."""

T = TypeVar("T")


class Service:
    """One served model.  model_ids: the names that requests may use; answers carry the first.  bounds: of what is let in.

    store: what is kept on disk, None for nothing.  background, batches: work without a client; see `kept.attach`.
    """

    store: Store | None = None
    pooling = "last"
    """How embeddings are pooled where a request does not say."""
    background: Background
    batches: BatchRunner

    def __init__(
        self,
        port: EnginePort,
        text: ModelText,
        model_ids: tuple[str, ...],
        version: str,
        bounds: Bounds | None = None,
        *,
        beside: Service | None = None,
        share_prefixes: bool = False,
        tool_parser: str = "auto",
        reasoning_parser: str = "auto",
        trust_templates: bool = False,
        lenient: bool = False,
    ) -> None:
        """beside: another model's, with which the rates of keys are counted.  share_prefixes: between keys.
        trust_templates: take requests' own chat templates.  lenient: with fields that are not known.  See `Dialect` for the
        parsers."""
        self._parsers = tool_parser, reasoning_parser
        self.dialect = Dialect(text, *self._parsers)
        self.trust_templates, self.lenient = trust_templates, lenient
        self.port = port
        admission = Admission(bounds or Bounds(), None if beside is None else beside.client.admission)
        self.client: Client = Client(port, text, admission=admission, share_prefixes=share_prefixes)
        self.text = self.client.text
        self.model_ids = model_ids
        self.version = version
        taken = sorted(set(model_ids) & self.client.adapters.keys())
        if taken:
            raise ConfigError(f"{taken[0]!r} names the model and an adapter; give the adapter another name")
        self.created = int(time.time())
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="weft-text")
        info = port.info
        self._setting = "\n".join((version, info.model_id, info.dtype, info.device, *info.stack))

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may name: the model, and its adapters."""
        return (*self.model_ids, *(name for name in self.client.adapters if name not in self.model_ids))

    def dialect_of(self, template: str | None) -> Dialect:
        """The model's dialect, or that of a template of the client's own.  Raises RequestError where that is not allowed."""
        if template is None:
            return self.dialect
        if not self.trust_templates:
            raise RequestError(
                "chat_template is not allowed here: the model's own template is used; a server that was started with "
                "--trust-request-chat-template takes the request's",
                param="chat_template",
                code="unsupported_parameter",
            )
        if len(template) > MAX_TEMPLATE_CHARS:
            raise RequestError(f"chat_template has more than {MAX_TEMPLATE_CHARS} characters", param="chat_template")
        return Dialect(replace(self.text, template=self.text.template.replaced(template)), *self._parsers)

    def resolve(self, model: str | None) -> str:
        """The name that an answer carries for the model or adapter that a request names.  RequestError (404) if unknown."""
        if model is None:
            return self.model_ids[0]
        if model not in self.model_ids and model not in self.client.adapters:
            raise unknown(model, self.names)
        return model

    def techniques(self, model: str) -> tuple[str, ...]:
        """What a request for this model lays over the server's stack: the adapter, if it is one.

        Raises RequestError (404) for an adapter that has gone meanwhile, rather than answer without it.
        """
        if model in self.model_ids:
            return ()
        part = self.client.adapters[self.resolve(model)].part
        assert part is not None
        return (part,)

    def fingerprint(self, model: str) -> str:
        """Changes with everything that may change answers under one seed."""
        adapter = self.client.adapters.get(model)
        own = adapter.digest if adapter is not None and model not in self.model_ids else ""
        return "fp_" + hashlib.blake2b((self._setting + own).encode(), digest_size=6).hexdigest()

    async def start(self, fields: Fields, prompts: Prompt | Sequence[Prompt]) -> Generation:
        """Send what a request asks for.  Raises RequestError, which names the field as the request wrote it."""
        if fields.weft is not None and fields.weft.timeline:
            given = [prompts] if isinstance(prompts, Prompt) else prompts
            prompts = [replace(prompt, timeline=True) for prompt in given]
        try:
            return await self.client.start(prompts)
        except RequestError as error:
            if error.param != PARAM or fields.structured_outputs is not None:
                raise
            field = "tools" if fields.structured is None else "response_format"
            raise RequestError(str(error).replace(PARAM, field), param=field, code=error.code) from None

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Do slow work on text in a thread, so that no stream has to wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        self.client.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def unknown(model: str, there: Sequence[str]) -> RequestError:
    """What is said of a name that nothing has."""
    return RequestError(
        f"the model {model[:200]!r} does not exist here; there is {', '.join(map(repr, there))}",
        param="model",
        code="model_not_found",
    )


def answer_id(prefix: str) -> str:
    """An id that no other answer has."""
    return f"{prefix}-{secrets.token_hex(16)}"
