"""The HTTP application: routes, keys, limits on bodies, errors in OpenAI's form.

/v1/models  /v1/models/{id}  /v1/completions  /v1/chat/completions     OpenAI's
/tokenize  /detokenize  /v1/load_lora_adapter  /v1/unload_lora_adapter  vLLM's
/health  /ready  /metrics  /version                                    for machines; open without a key
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from weft import __version__
from weft.errors import EngineError, RequestError
from weft.front.admission import Bounds
from weft.front.health import health, state_of
from weft.front.metrics import CONTENT_TYPE
from weft.front.openai.adapters import load_adapter, unload_adapter
from weft.front.openai.answer import JSONAnswer, StreamAnswer
from weft.front.openai.chat import chat
from weft.front.openai.completions import complete
from weft.front.openai.errors import error_response
from weft.front.openai.models import get_model, list_models
from weft.front.openai.service import Service
from weft.front.openai.tokens import detokenize, tokenize
from weft.front.port import EnginePort
from weft.front.text import ModelText

MAX_BODY_BYTES = 32 << 20
BODY_TIMEOUT_S = 120.0
STALL_S = 30.0
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version"})


def create_app(
    port: EnginePort,
    text: ModelText,
    *,
    model_ids: Sequence[str],
    api_key: str | None = None,
    max_body: int = MAX_BODY_BYTES,
    body_timeout_s: float = BODY_TIMEOUT_S,
    stall_s: float = STALL_S,
    tool_parser: str = "auto",
    reasoning_parser: str = "auto",
    trust_templates: bool = False,
    bounds: Bounds | None = None,
) -> Starlette:
    """The application over one engine.

    model_ids: names that requests may use for the model, at least one.
    api_key: what `Authorization: Bearer` must carry on all routes but OPEN_PATHS; None asks for none.
    max_body: bytes of a request's body.  body_timeout_s: for sending it.
    stall_s: seconds without a step, work waiting, after which /health answers 503.  bounds: of what is let in at once.
    tool_parser, reasoning_parser: how the model calls tools and thinks; trust_templates: take requests' own chat templates
    (see `Service`).  Raises ConfigError for parsers that there are not.
    """
    service = Service(
        port,
        text,
        tuple(model_ids),
        __version__,
        bounds,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        trust_templates=trust_templates,
    )
    routes = Routes(service, max_body, body_timeout_s, stall_s)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            service.close()

    app = Starlette(
        routes=routes.table(),
        middleware=[Middleware(Key, api_key=api_key)] if api_key else [],
        exception_handlers={
            HTTPException: _on_http_exception,
            EngineError: _on_error,
            ClientDisconnect: _on_error,
            Exception: _on_error,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


class Routes:
    """The routes' functions over one service."""

    def __init__(self, service: Service, max_body: int, body_timeout_s: float, stall_s: float) -> None:
        self.service = service
        self.max_body = max_body
        self.body_timeout_s = body_timeout_s
        self.stall_s = stall_s

    def table(self) -> list[Route]:
        return [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            self.post("/v1/completions", complete),
            self.post("/v1/chat/completions", chat),
            self.post("/tokenize", tokenize),
            self.post("/detokenize", detokenize),
            self.post("/v1/load_lora_adapter", load_adapter),
            self.post("/v1/unload_lora_adapter", unload_adapter),
            Route("/health", self.health, methods=["GET"]),
            Route("/ready", self.health, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/version", self.version, methods=["GET"]),
        ]

    def post(self, path: str, make: Callable[[Service, bytes], Awaitable[Any]]) -> Route:
        """A route whose JSON body `make` turns into an answer, or into an object to be sent as JSON."""

        async def endpoint(request: Request) -> Any:
            _check_type(request)
            try:
                async with asyncio.timeout(self.body_timeout_s):
                    body = await _read_body(request, self.max_body)
            except TimeoutError:
                text = f"the body did not arrive within {self.body_timeout_s:g} s; send it faster"
                raise RequestError(text, code="timeout") from None
            made = await make(self.service, body)
            return made if isinstance(made, JSONAnswer | StreamAnswer | Response) else _json(made)

        return Route(path, endpoint, methods=["POST"])

    async def health(self, _: Request) -> Response:
        return health(state_of(self.service.port, self.stall_s))

    async def metrics(self, _: Request) -> Response:
        page = self.service.client.metrics.render(self.service.port.stats)
        return Response(page, headers={"content-type": CONTENT_TYPE})

    async def version(self, _: Request) -> Response:
        return _json({"version": self.service.version})

    async def models(self, _: Request) -> Response:
        return _json(list_models(self.service))

    async def model(self, request: Request) -> Response:
        return _json(get_model(self.service, request.path_params["name"]))


class Key:
    """Middleware: every route but OPEN_PATHS needs the key."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self._want = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scheme, _, key = given.partition(b" ")
            # compare_digest is called either way, so that time tells nothing about the key
            if not hmac.compare_digest(key.strip(), self._want) or scheme.lower() != b"bearer":
                error = RequestError(
                    "this server needs its key: send the header Authorization: Bearer KEY", code="invalid_api_key"
                )
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


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


def _json(payload: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(payload), status_code=status, media_type="application/json")


async def _on_error(_: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: unknown routes and methods."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(getattr(error, "headers", None) or {})
    if status == 405:
        allowed = headers.get("Allow", "another method")
        text = f"{request.method} is not possible on {request.url.path[:200]}; use {allowed}"
        return error_response(RequestError(text, code="method_not_allowed"), headers)
    text = f"there is no route {request.url.path[:200]}; weft has /v1/chat/completions, /v1/completions and /v1/models"
    return error_response(RequestError(text, code="not_found"), headers)
