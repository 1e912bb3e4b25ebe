"""What every request goes through before it reaches a route: from where it comes, and with whose key.

Addressed  a target that is a whole address (`GET http://host/path`, as some proxies send it) is the path, asked under that host
Visitors   the Host names this server, and the Origin, where a browser sends one, is the server's own page or was allowed.  A page
           from elsewhere can then not drive a server that listens on the loopback, also not under a name of its own that it has
           made resolve to 127.0.0.1 (DNS rebinding)
Key        a key on every route but OPEN_PATHS and the page's files; an administrator's on those that change the server
Rooted     the same routes below a path

All deny by default: a route that is added needs a key until it is listed here.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from weft.errors import ConfigError, RequestError
from weft.front.admission import KEY, OWNER
from weft.front.anthropic.errors import ANTHROPIC
from weft.front.keys import Keyring
from weft.front.openai.answer import OPENAI, Form

MESSAGES = "/v1/messages"
TENANT = "weft.tenant"
"""Under this name a request's scope says whose it is."""
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
OPEN_BELOW = "/static/"
CONTROL_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""What changes the server for everybody."""
ANY = "*"
PORTS = {"http": 80, "https": 443}
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?")
_ADDRESS = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)
_UNPRINTED = re.compile(r"[\x00-\x20\x7f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """keys: of clients and administrators.  hosts: names beside the loopback's and addresses under which the server is asked; `*`
    for all.  origins: of pages elsewhere that may use it.  share_prefixes: whether keys share cached prefixes.
    root_path: what stands before all paths.
    """

    keys: Keyring = field(default_factory=Keyring)
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    share_prefixes: bool = False
    root_path: str = ""

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        for host in self.hosts:
            found = _HOST.fullmatch(host.lower())
            if host != ANY and (found is None or found[2]):
                raise ConfigError(f"--allowed-host {host!r} is no name; give one without scheme and port, or * for all")
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--cors-origin {origin!r} is no origin; give scheme://host[:port] in lower case and no more, "
                    "e.g. https://chat.example.com"
                )
        if self.root_path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", self.root_path):
            raise ConfigError(f"--root-path {self.root_path!r} is no path; give one such as /llm, without a last slash")

    def visitors(self, app: ASGIApp) -> ASGIApp:
        """What anybody may read who asks under this server's name, the page."""
        return Visitors(app, self.hosts, self.origins)

    def middleware(self) -> list[Middleware]:
        """The outermost first."""
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(self.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["retry-after", "request-id", "x-request-id"],
        )
        return [
            Middleware(Visitors, hosts=self.hosts, origins=self.origins),
            *([cors] if self.origins else []),
            Middleware(Key, keys=self.keys),
        ]


class Addressed:
    """Takes targets in absolute form as well (RFC 9112, 3.2.2): the authority in the target counts, and no Host beside it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (found := _ADDRESS.match(scope["raw_path"])):
            raw = scope["raw_path"][found.end() :] or b"/"
            headers = [(b"host", found[1]), *(pair for pair in scope["headers"] if pair[0] != b"host")]
            scope = {**scope, "raw_path": raw, "path": unquote(raw.decode("latin-1")), "headers": headers}
        await self.app(scope, receive, send)


class Visitors:
    """Middleware that refuses requests under names that are not this server's, and from pages that are not."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str] = (), origins: Sequence[str] = ()) -> None:
        self.app = app
        self._hosts, self._origins = frozenset(map(str.lower, hosts)), frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refused(scope)):
            await form_of(scope["path"]).response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refused(self, scope: Scope) -> RequestError | None:
        hosts = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
        for host in hosts:
            if not self._ours(host):
                return RequestError(
                    f"this server is not asked under the name {host[:100]!r}; where it is meant to be, start it with "
                    "--allowed-host and that name",
                    code="host_not_allowed",
                )
        for name, value in scope["headers"]:
            if name == b"origin":
                origin = value.decode("latin-1").lower()
                if origin not in self._origins and not any(_same(origin, host) for host in hosts):
                    return RequestError(
                        f"pages of {origin[:100]!r} may not use this server; where they are meant to, start it with "
                        "--cors-origin and that origin",
                        code="origin_not_allowed",
                    )
        return None

    def _ours(self, host: str) -> bool:
        """Names are allowed one by one.  An address can't be rebound: whoever asks under it has reached it."""
        found = _HOST.fullmatch(host)
        if found is None:
            return ANY in self._hosts
        name = found[1].removesuffix(".")
        if ANY in self._hosts or name in self._hosts or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True


def _same(origin: str, host: str) -> bool:
    """Whether a page of this origin is one that was asked for under this Host; the scheme is a proxy's business."""
    own, at = _ORIGIN.fullmatch(origin), _HOST.fullmatch(host)
    if own is None or at is None or own[1] not in PORTS:
        return False
    usual = PORTS[own[1]]
    return own[2] == at[1] and int(own[3] or usual) == int(at[2] or usual)


class Key:
    """Middleware that asks for keys.  What a request stores, and whose prefixes it shares, goes by the key that it came with.

    With clients' keys every route but the open ones needs one of them, or an administrator's.  The routes that change the server
    need an administrator's as soon as there is any key.
    """

    def __init__(self, app: ASGIApp, keys: Keyring) -> None:
        self.app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refused(scope)):
            await form_of(scope["path"]).response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refused(self, scope: Scope) -> RequestError | None:
        path: str = scope["path"]
        if _UNPRINTED.search(path):  # no route has any, and a regular expression may overlook one at its end
            return RequestError(f"there is no route {path[:200]!r}", code="not_found")
        if path in OPEN_PATHS or path.startswith(OPEN_BELOW):
            return None
        keys = self._keys
        found = keys.find(given_key(scope))
        if found is not None:
            scope[TENANT] = found.tenant
            KEY.set(found.tenant)
            OWNER.set(found.owner)
        control = path in CONTROL_PATHS
        if found is None and (keys.asks_clients or (control and keys)):
            text = "this server needs its key: send the header Authorization: Bearer KEY"
            return RequestError(text, code="invalid_api_key")
        if control and keys and not (found and found.admin):
            hint = "send that" if keys.asks_admins else "start it with --admin-key-file to have one"
            return RequestError(f"this changes the server, and needs its admin key; {hint}", code="forbidden")
        return None


class Rooted:
    """Everything below a path, whether a proxy has taken that off or not.

    The page's own links are relative, so the path alone, without a slash behind it, leads a reader to the one with it.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app, self._root = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root = self._root
        if scope["type"] == "http" and scope["path"] == root and scope["method"] in ("GET", "HEAD"):
            query = scope["query_string"].decode("latin-1")
            # Relative, as only the last part is known to stand in the reader's address too.
            await RedirectResponse(f"{root.rpartition('/')[2]}/{'?' if query else ''}{query}", 307)(
                scope, receive, send
            )
            return
        if scope["type"] == "http" and (scope["path"] == root or scope["path"].startswith(root + "/")):
            scope = {**scope, "path": scope["path"].removeprefix(root) or "/"}
        await self.app(scope, receive, send)


def framed_twice(scope: Scope) -> RequestError | None:
    """Why a request with two ends is refused: a proxy that goes by the other one would take what follows for something else.

    h11 refuses every other doubt about where a body ends, and goes by the chunks here (RFC 9112, 6.1).
    """
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
        return RequestError("a body has a Content-Length or comes in chunks, not both; leave one of the headers out")
    return None


def given_key(scope: Scope) -> bytes:
    """The key of a request, by OpenAI's header or by Anthropic's; empty where there is none."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer":
                return bytes(key.strip())
        elif name == b"x-api-key":
            return bytes(value.strip())
    return b""


def form_of(path: str) -> Form:
    """In whose form a route tells its errors."""
    return ANTHROPIC if path == MESSAGES or path.startswith(f"{MESSAGES}/") else OPENAI
