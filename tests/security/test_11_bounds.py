"""Row 11: alternatives, sequences and ids out of bounds are refused where they are read; no id reaches the engine unchecked."""

from __future__ import annotations

from typing import Any

from tests.security.conftest import Attacked, is_refused

SAY = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
HUGE = [10**9, 5 * 10**6, 1 << 31, 1 << 63, 1 << 80, -1, -(1 << 40)]
IDS = [4096, 151_936, 1 << 31, (1 << 31) - 1, 1 << 63, 1 << 80, -1, -(1 << 31)]
ATTACKS: list[tuple[str, dict[str, Any]]] = [
    *(("/v1/completions", {"prompt": "a", "max_tokens": 1, "logprobs": n}) for n in HUGE),
    *(("/v1/completions", {"prompt": "a", "max_tokens": 1, "n": n}) for n in HUGE),
    *(("/v1/completions", {"prompt": "a", "max_tokens": 1, "best_of": n}) for n in HUGE),
    *(("/v1/chat/completions", {**SAY, "logprobs": True, "top_logprobs": n}) for n in HUGE),
    *(("/v1/chat/completions", {**SAY, "n": n}) for n in HUGE),
    *(("/v1/completions", {"prompt": [id], "max_tokens": 1}) for id in IDS),
    *(("/v1/completions", {"prompt": [[5], [id]], "max_tokens": 1}) for id in IDS),
    *(("/v1/completions", {"prompt": "a", "max_tokens": 1, "stop_token_ids": [id]}) for id in IDS),
    *(("/v1/completions", {"prompt": "a", "max_tokens": 1, "logit_bias": {str(id): 1}}) for id in IDS),
    *(("/v1/embeddings", {"input": [id]}) for id in IDS),
    *(("/detokenize", {"tokens": [id]}) for id in IDS),
    ("/v1/completions", {"prompt": ["a"] * 2048, "n": 128, "max_tokens": 1}),
    ("/v1/completions", {"prompt": ["a"] * 100_000, "max_tokens": 1}),
]


def test_they_are_refused(server: Attacked) -> None:
    with server.attacked():
        for path, body in ATTACKS:
            is_refused(server.post(path, body))
