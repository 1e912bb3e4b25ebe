"""Row 10: a count of 10^9 in a small body is refused before anything is laid out for it."""

from __future__ import annotations

from typing import Any

from tests.security.conftest import Attacked, is_refused

HUGE = 10**9
SAY = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
ATTACKS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "a", "max_tokens": 1, "n": HUGE}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 1, "n": 129}),
    ("/v1/completions", {"prompt": ["a"] * 1025, "max_tokens": 1, "n": 2}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 1, "best_of": HUGE}),
    ("/v1/chat/completions", {**SAY, "n": HUGE}),
    ("/v1/chat/completions", {**SAY, "n": 129}),
    ("/v1/responses", {"input": "a", "n": HUGE}),
    ("/v1/responses", {"input": "a", "top_logprobs": HUGE}),
    ("/v1/responses", {"input": [{"role": "user", "content": "a"}] * 5000}),
    ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": "a"}] * 200_000}),
    ("/v1/embeddings", {"input": ["a"] * 500_000}),
    ("/v1/embeddings", {"input": [[5]] * 100_000}),
    ("/v1/embeddings", {"input": "a", "dimensions": HUGE}),
]


def test_they_are_refused(server: Attacked) -> None:
    with server.attacked():
        for path, body in ATTACKS:
            is_refused(server.post(path, body))
