"""`Call`: what a route with more than a body gets to see, and the checks of ids, limits and metadata that such routes share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from weft.errors import RequestError
from weft.front.ids import random_bytes
from weft.front.openai.service import Service

MAX_ID_CHARS = 128
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512

S = TypeVar("S")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request.

    tenant: whose it is, see `app.Key`.  body: of a route that takes JSON, else empty.  stream: the body of a route that reads it
    itself.  path, query: parameters.  headers: by lower-case name.
    """

    service: Service
    tenant: str
    body: bytes = b""
    stream: AsyncIterator[bytes] | None = None
    path: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The id in the path, cut to what an id may be long; what is no id is not found, whatever it says."""
        return self.path["id"][:MAX_ID_CHARS]

    def number(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number of the query.  Raises RequestError."""
        given = self.query.get(name)
        if given is None:
            return default
        if not given.isascii() or not given.isdigit() or len(given) > 9 or not low <= int(given) <= high:
            raise RequestError(f"{name} must be a whole number from {low} to {high}", param=name)
        return int(given)

    def choice(self, name: str, default: str, *others: str) -> str:
        """One of several words of the query.  Raises RequestError."""
        given = self.query.get(name, default)
        if given not in (default, *others):
            raise RequestError(f"{name} must be one of {', '.join((default, *others))}", param=name)
        return given

    def after(self) -> str | None:
        """The id that a listing goes on after."""
        given = self.query.get("after")
        return None if given is None else given[:MAX_ID_CHARS]


def fresh_id(prefix: str) -> str:
    """An id that no other object has, and that nobody guesses: 192 random bits."""
    return prefix + random_bytes(24).hex()


def check_metadata(metadata: dict[str, str] | None) -> dict[str, str]:
    """Raises RequestError beyond OpenAI's bounds."""
    given = metadata or {}
    if len(given) > MAX_METADATA:
        raise RequestError(f"metadata: at most {MAX_METADATA} pairs, got {len(given)}", param="metadata")
    for key, value in given.items():
        if len(key) > MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE:
            raise RequestError(
                f"metadata: keys have at most {MAX_METADATA_KEY} characters, values at most {MAX_METADATA_VALUE}",
                param="metadata",
            )
    return given


def stored(kept: S | None) -> S:
    """What this server keeps.  Raises RequestError where it keeps nothing."""
    if kept is None:
        raise RequestError(
            "this server keeps no responses, files or batches: it has no folder for them; start it with --data-dir",
            code="no_store",
        )
    return kept
