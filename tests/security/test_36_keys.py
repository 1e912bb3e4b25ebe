"""Row 36: keys are compared in a time that tells nothing about them, all of them, whichever is right."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

import pytest

from weft.front.app import Key


@pytest.mark.parametrize("header", [(b"authorization", b"Bearer %s"), (b"x-api-key", b"%s")])
@pytest.mark.parametrize("given", [b"first", b"second", b"wrong", b"", b"\xff\x00", b"first "])
def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch, header: tuple[bytes, bytes], given: bytes) -> None:
    seen: list[bytes] = []
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        seen.append(b)
        return real(a, b)

    monkeypatch.setattr("weft.front.app.hmac.compare_digest", compare)
    passed: list[str] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["weft.tenant"])

    async def send(message: Any) -> None:
        sent.append(message)

    name, form = header
    scope = {"type": "http", "path": "/v1/models", "headers": [(name, form % given)], "method": "GET"}
    asyncio.run(Key(app, ["first", "second"])(scope, None, send))  # type: ignore[arg-type]
    assert seen == [b"first", b"second"]
    right = given.strip() in (b"first", b"second")
    assert bool(passed) is right
    assert right or sent[0]["status"] == 401
    assert (
        given not in (b"first", b"second") or given.decode() not in passed[0]
    )  # a tenant's name does not hold the key
