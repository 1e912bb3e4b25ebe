"""The HTTP application: routes, keys, limits on bodies, errors in OpenAI's form.

/v1/models  /v1/models/{id}  /v1/completions  /v1/chat/completions     OpenAI's
/v1/responses  /v1/files  /v1/batches  /v1/embeddings                   OpenAI's
/v1/messages  /v1/messages/count_tokens                                Anthropic's
/tokenize  /detokenize  /v1/load_lora_adapter  /v1/unload_lora_adapter  vLLM's
/v1/weft/live                                                          what the server is at, for who watches
/openapi.json                                                          what all of these take and give
/health  /ready  /metrics  /version                                    for machines; the first two open without a key
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from weft import __version__
from weft.errors import EngineError, RequestError
from weft.front.admission import Bounds
from weft.front.anthropic.messages import count_tokens, create_message
from weft.front.guard import TENANT, Guard, form_of
from weft.front.health import health, state_of, states_of
from weft.front.keys import keyring
from weft.front.live import LiveAnswer, hello
from weft.front.metrics import CONTENT_TYPE, page
from weft.front.openai.adapters import load_adapter, unload_adapter
from weft.front.openai.batches import cancel_batch, create_batch, get_batch, list_batches
from weft.front.openai.calls import Call
from weft.front.openai.chat import chat
from weft.front.openai.completions import complete
from weft.front.openai.embeddings import embed
from weft.front.openai.files import delete_file, file_content, get_file, list_files, upload_file
from weft.front.openai.kept import attach, working
from weft.front.openai.models import get_model, list_models
from weft.front.openai.responses import (
    cancel_response,
    create_response,
    delete_response,
    get_response,
    input_items_of,
)
from weft.front.openai.service import Service
from weft.front.openai.services import Services
from weft.front.openai.tokens import detokenize, tokenize
from weft.front.openapi import description
from weft.front.page import serve_page
from weft.front.port import EnginePort, EngineState
from weft.front.store import Store
from weft.front.text import ModelText

MAX_BODY_BYTES = 32 << 20
BODY_TIMEOUT_S = 120.0
SLOW_BYTES_S = 64 << 10
"""Bytes a second, at least, of an upload."""
STALL_S = 30.0


@dataclass(frozen=True, slots=True)
class Served:
    """A model as a server has it: its engine, its text side, and the names that requests may use for it, at least one."""

    port: EnginePort
    text: ModelText
    model_ids: Sequence[str]


def create_app(
    port: EnginePort,
    text: ModelText,
    *,
    model_ids: Sequence[str],
    others: Sequence[Served] = (),
    api_key: str | Sequence[str] | None = None,
    max_body: int = MAX_BODY_BYTES,
    body_timeout_s: float = BODY_TIMEOUT_S,
    stall_s: float = STALL_S,
    store: Store | None = None,
    pooling: str = "last",
    tool_parser: str = "auto",
    reasoning_parser: str = "auto",
    trust_templates: bool = False,
    lenient: bool = False,
    bounds: Bounds | None = None,
    guard: Guard | None = None,
) -> Starlette:
    """The application over one engine, or over one for each of several models.

    model_ids: names that requests may use for the model, at least one.  others: models beside it, which a request names.
    api_key: what `Authorization: Bearer` (or `x-api-key`) must carry, one of several where a list is given; None asks for none.
    What is stored under one key is not there for another.  guard: more of that, instead of api_key.
    max_body: bytes of a request's body.  body_timeout_s: for sending it.
    stall_s: seconds without a step, work waiting, after which /health answers 503.  bounds: of what is let in at once.
    store: where responses, files and batches are kept; None keeps none.  The application closes it.
    pooling: last or mean, of embeddings whose requests do not say.
    tool_parser, reasoning_parser: how the model calls tools and thinks; trust_templates: take requests' own chat templates
    (see `Service`).  lenient: ignore fields of requests that are not known, instead of refusing them.
    Raises ConfigError for parsers that there are not, and for two models of one name.
    """
    guard = guard or Guard(keys=keyring(api_key))
    services = _services(
        [Served(port, text, model_ids), *others],
        bounds,
        pooling,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        trust_templates=trust_templates,
        lenient=lenient,
        share_prefixes=guard.share_prefixes,
    )
    attach(services, store)
    routes = Routes(services, max_body, body_timeout_s, stall_s, guard.root_path)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            async with working(services):
                yield
        finally:
            services.close()

    app = Starlette(
        routes=routes.table(),
        middleware=guard.middleware(),
        exception_handlers={
            HTTPException: _on_http_exception,
            EngineError: _on_error,
            ClientDisconnect: _on_error,
            Exception: _on_error,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.services = services
    app.state.page = guard.visitors(serve_page)
    return app


def _services(served: Sequence[Served], bounds: Bounds | None, pooling: str, **options: Any) -> Services:
    """options: of each `Service`."""
    made: list[Service] = []
    for one in served:
        beside = made[0] if made else None
        service = Service(one.port, one.text, tuple(one.model_ids), __version__, bounds, beside=beside, **options)
        service.pooling = pooling
        made.append(service)
    return Services(made)


class Routes:
    """The routes' functions over the models of a server."""

    def __init__(
        self, services: Services, max_body: int, body_timeout_s: float, stall_s: float, root_path: str = ""
    ) -> None:
        self.services = services
        self.max_body = max_body
        self.body_timeout_s = body_timeout_s
        self.stall_s = stall_s
        self.root_path = root_path

    def table(self) -> list[Route]:
        return [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            self.post("/v1/completions", complete),
            self.post("/v1/chat/completions", chat),
            self.call("POST", "/v1/responses", create_response, body=True),
            self.call("GET", "/v1/responses/{id}", get_response),
            self.call("DELETE", "/v1/responses/{id}", delete_response),
            self.call("POST", "/v1/responses/{id}/cancel", cancel_response),
            self.call("GET", "/v1/responses/{id}/input_items", input_items_of),
            self.call("POST", "/v1/files", upload_file, stream=True),
            self.call("GET", "/v1/files", list_files),
            self.call("GET", "/v1/files/{id}", get_file),
            self.call("DELETE", "/v1/files/{id}", delete_file),
            self.call("GET", "/v1/files/{id}/content", file_content),
            self.call("POST", "/v1/batches", create_batch, body=True),
            self.call("GET", "/v1/batches", list_batches),
            self.call("GET", "/v1/batches/{id}", get_batch),
            self.call("POST", "/v1/batches/{id}/cancel", cancel_batch),
            self.call("POST", "/v1/messages", create_message, body=True),
            self.call("POST", "/v1/messages/count_tokens", count_tokens, body=True),
            self.call("POST", "/v1/embeddings", embed, body=True),
            self.post("/tokenize", tokenize),
            self.post("/detokenize", detokenize),
            self.post("/v1/load_lora_adapter", load_adapter),
            self.post("/v1/unload_lora_adapter", unload_adapter),
            Route("/v1/weft/live", self.live, methods=["GET"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/ready", self.health, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/version", self.version, methods=["GET"]),
        ]

    def post(self, path: str, make: Callable[[Service, bytes], Awaitable[Any]]) -> Route:
        """A route whose JSON body `make` turns into an answer, or into an object to be sent as JSON."""

        async def endpoint(request: Request) -> Any:
            given = await self._body(request)
            return _answer(await make(self.services.asked(given), given))

        return Route(path, endpoint, methods=["POST"])

    def call(
        self,
        method: str,
        path: str,
        make: Callable[[Call], Awaitable[Any]],
        *,
        body: bool = False,
        stream: bool = False,
    ) -> Route:
        """A route whose function sees the whole request.  body: it takes JSON.  stream: it reads the body itself."""

        async def endpoint(request: Request) -> Any:
            given = await self._body(request) if body else b""
            return _answer(
                await make(
                    Call(
                        service=self.services.asked(given) if body else self.services.first,
                        tenant=request.scope.get(TENANT, ""),
                        body=given,
                        stream=self._stream(request) if stream else None,
                        path=request.path_params,
                        query=request.query_params,
                        headers=request.headers,
                    )
                )
            )

        return Route(path, endpoint, methods=[method])

    async def _body(self, request: Request) -> bytes:
        _check_type(request)
        try:
            async with asyncio.timeout(self.body_timeout_s):
                return await _read_body(request, self.max_body)
        except TimeoutError:
            text = f"the body did not arrive within {self.body_timeout_s:g} s; send it faster"
            raise RequestError(text, code="timeout") from None

    async def _stream(self, request: Request) -> AsyncIterator[bytes]:
        """The body as it comes, by whoever sends at least SLOW_BYTES_S after the time that every body has."""
        loop, total = asyncio.get_running_loop(), 0
        began = loop.time()
        try:
            chunks = request.stream()
            while True:
                async with asyncio.timeout_at(began + self.body_timeout_s + total / SLOW_BYTES_S):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                total += len(chunk)
                yield chunk
        except TimeoutError:
            raise RequestError("the body comes too slowly; send it faster", code="timeout") from None

    async def health(self, request: Request) -> Response:
        """Of all models, or of the one that the query names."""
        name = request.query_params.get("model")
        return health(self._state() if name is None else state_of(self.services.of(name).port, self.stall_s))

    def _state(self) -> EngineState:
        return states_of(self.services.ports, self.stall_s)

    async def metrics(self, _: Request) -> Response:
        label = self.services.several
        told = [(s.model_ids[0] if label else "", s.client.metrics, s.port.stats) for s in self.services]
        return Response(page(told), headers={"content-type": CONTENT_TYPE})

    async def live(self, request: Request) -> Any:
        """What whoever watches sees, while they do: of the model that the query names, else of the first."""
        service = self.services.of(request.query_params.get("model"))
        engines = tuple(self.services.ports) if self.services.several else ()
        told = hello(service.client, service.model_ids, service.version, engines)
        return LiveAnswer(service.client.live, self._state, told)

    async def version(self, _: Request) -> Response:
        return _json({"version": __version__})

    async def openapi(self, _: Request) -> Response:
        return _json({**description(), "servers": [{"url": self.root_path or "/"}]})

    async def models(self, _: Request) -> Response:
        return _json(list_models(self.services))

    async def model(self, request: Request) -> Response:
        return _json(get_model(self.services, request.path_params["name"]))


def _check_type(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise RequestError(
            f"the body must be JSON: send the header Content-Type: application/json (got {kind[:60] or 'none'!r})",
            code="unsupported_media_type",
        )


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, refused before it is held when it is longer than `limit`.

    What is too long is read to its end and dropped (up to four times the limit), since many clients look at the answer
    only when they have sent everything.
    """
    said = request.headers.get("content-length", "0")
    total = 0
    too_long = said.isdigit() and int(said) > limit
    chunks: list[bytes] = []
    if not (too_long and request.headers.get("expect")):
        async for chunk in request.stream():
            total += len(chunk)
            if total > limit:
                too_long = True
                chunks.clear()
                if total > 4 * limit:
                    break
            elif not too_long:
                chunks.append(chunk)
    if too_long:
        raise RequestError(f"the body is longer than {limit} bytes; send less at once", code="body_too_large")
    return b"".join(chunks)


def _answer(made: Any) -> Any:
    """What a route's function made, as an ASGI response: it is one, or an object to be sent as JSON."""
    return made if callable(made) else _json(made)


def _json(payload: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(payload), status_code=status, media_type="application/json")


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    return form_of(request.url.path).response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: unknown routes and methods."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(getattr(error, "headers", None) or {})
    if status == 405:
        allowed = headers.get("Allow", "another method")
        text = f"{request.method} is not possible on {request.url.path[:200]}; use {allowed}"
        return form_of(request.url.path).response(RequestError(text, code="method_not_allowed"), headers)
    text = f"there is no route {request.url.path[:200]}; weft has /v1/chat/completions, /v1/completions and /v1/models"
    return form_of(request.url.path).response(RequestError(text, code="not_found"), headers)
