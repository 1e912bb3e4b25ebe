"""Row 36: keys are compared in a time that tells nothing about them, all of them, whichever is right."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from typing import Any

import pytest

from weft.front.guard import Key
from weft.front.keys import keyring

KEYS = ["first", "second"]


@pytest.mark.parametrize("header", [(b"authorization", b"Bearer %s"), (b"x-api-key", b"%s")])
@pytest.mark.parametrize("given", [b"first", b"second", b"wrong", b"", b"\xff\x00", b"first ", b"x" * 60_000])
def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch, header: tuple[bytes, bytes], given: bytes) -> None:
    """Digests of one length are, so that not even the length of a key is told."""
    seen: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        seen.append((a, b))
        return real(a, b)

    monkeypatch.setattr("weft.front.keys.hmac.compare_digest", compare)
    passed: list[str] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["weft.tenant"])

    async def send(message: Any) -> None:
        sent.append(message)

    name, form = header
    scope = {"type": "http", "path": "/v1/models", "headers": [(name, form % given)], "method": "GET"}
    asyncio.run(Key(app, keyring(KEYS))(scope, None, send))  # type: ignore[arg-type]
    key = given.strip()
    assert seen == [(hashlib.sha256(key).digest(), hashlib.sha256(want.encode()).digest()) for want in KEYS]
    right = key in (b"first", b"second")
    assert bool(passed) is right
    assert right or sent[0]["status"] == 401
    assert not right or key.decode() not in passed[0]  # a tenant's name does not hold the key
