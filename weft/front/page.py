"""The page at `/`: plain files, no build step, nothing from elsewhere.  The gate serves it, also while the model loads.

Its policy (Content-Security-Policy) lets it load, run and ask nothing but what this server has, and be put into no other page.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from weft.errors import RequestError
from weft.front.openai.errors import error_response

FOLDER = Path(__file__).parent / "static"
BELOW = "/static/"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class File:
    """One file of the page, as it is sent."""

    body: bytes
    headers: Mapping[str, str]


def is_page(path: str) -> bool:
    """Whether a path is the page's, and no route of the API."""
    return path == "/" or path.startswith(BELOW)


@cache
def files() -> dict[str, File]:
    """The page's files by path.  What is asked for is looked up here, so no path leads out of the folder."""
    found: dict[str, File] = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in TYPES:
            body = path.read_bytes()
            mark = hashlib.blake2b(body, digest_size=12).hexdigest()
            headers = {**HEADERS, "content-type": TYPES[path.suffix], "etag": f'"{mark}"'}
            found["/" if path.name == "index.html" else BELOW + path.name] = File(body, headers)
    return found


async def serve_page(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request for which `is_page` holds."""
    file = files().get(scope["path"])
    if scope["method"] not in ("GET", "HEAD"):
        text = f"{scope['method'][:20]} is not possible on the page; the API is at /v1"
        answer = error_response(RequestError(text, code="method_not_allowed"), {"allow": "GET, HEAD"})
    elif file is None:
        text = f"there is no file {scope['path'][:200]}; the page is at /"
        answer = error_response(RequestError(text, code="not_found"))
    elif dict(scope["headers"]).get(b"if-none-match", b"").decode("latin-1") == file.headers["etag"]:
        answer = Response(status_code=304, headers=file.headers)
    else:
        head = {**file.headers, "content-length": str(len(file.body))}
        answer = Response(file.body if scope["method"] == "GET" else b"", headers=head)
    await answer(scope, receive, send)
