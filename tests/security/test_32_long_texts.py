"""Row 32: texts of tens of megabytes are refused by their length, in every field that is made into tokens; no count can wrap."""

from __future__ import annotations

import time

from tests.security.conftest import Attacked, is_refused

LONG = "a " * (9 << 20)
DENSE = "\u00e9" * (14 << 20)


def test_they_are_refused(server: Attacked) -> None:
    with server.attacked():
        for text in (LONG, DENSE):
            turn = [{"role": "user", "content": text}]
            for path, body in (
                ("/v1/completions", {"prompt": text, "max_tokens": 1}),
                ("/v1/chat/completions", {"messages": turn, "max_tokens": 1}),
                ("/v1/responses", {"input": text}),
                ("/v1/messages", {"messages": turn, "max_tokens": 1}),
                ("/v1/messages/count_tokens", {"messages": turn}),
                ("/v1/embeddings", {"input": text}),
                ("/tokenize", {"prompt": text}),
            ):
                began = time.monotonic()
                is_refused(server.post(path, body))
                assert time.monotonic() - began < 60, path


def test_counts_are_whole(server: Attacked) -> None:
    """What is just taken is counted rightly, though it has more tokens than any context."""
    with server.attacked():
        answer = server.post("/tokenize", {"prompt": "a " * 200_000}).json()
        assert answer["count"] == len(answer["tokens"]) >= 200_000
