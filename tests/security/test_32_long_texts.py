"""Row 32: texts of megabytes are refused by their length, in every field that is made into tokens; no count can wrap."""

from __future__ import annotations

import time

import pytest

from tests.security.conftest import Attacked, is_refused

LONG = "a " * (4 << 20)
LONGEST = "\u00e9" * (14 << 20)


CHATS = ["/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"]
ROUTES = ["/v1/completions", "/v1/responses", "/v1/embeddings", *CHATS]


def body(path: str, text: str) -> dict[str, object]:
    field = {
        "/v1/completions": "prompt",
        "/v1/responses": "input",
        "/v1/embeddings": "input",
        "/tokenize": "prompt",
    }.get(path)
    return {field: text} if field else {"max_tokens": 1, "messages": [{"role": "user", "content": text}]}


CASES = [*((path, LONG) for path in [*ROUTES, "/tokenize"]), ("/v1/completions", LONGEST), ("/tokenize", LONGEST)]


@pytest.mark.parametrize(("path", "text"), CASES, ids=[f"{path} {len(text)}" for path, text in CASES])
def test_they_are_refused(server: Attacked, path: str, text: str) -> None:
    with server.attacked():
        began = time.monotonic()
        answer = server.post(path, body(path, text))
        if path != "/v1/messages/count_tokens":
            is_refused(answer)
        assert answer.status_code < 500
        assert time.monotonic() - began < 60


def test_counts_are_whole(server: Attacked) -> None:
    """What is taken is counted rightly."""
    with server.attacked():
        given = server.post("/tokenize", {"prompt": "a " * 3_000})
        assert given.status_code == 200, given.text
        answer = given.json()
        assert answer["count"] == len(answer["tokens"]) >= 3_000
