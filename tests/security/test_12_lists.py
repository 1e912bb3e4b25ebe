"""Row 12: half a million stop strings, pairs or ids are refused quickly."""

from __future__ import annotations

from typing import Any

from tests.security.conftest import Attacked, is_refused

MANY = [f"s{i}" for i in range(500_000)]
ATTACKS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": "a"}], "stop_sequences": MANY}),
    ("/v1/responses", {"input": "a", "stop": MANY}),
    ("/v1/responses", {"input": "a", "metadata": dict.fromkeys(MANY, "x")}),
    ("/v1/responses", {"input": "a", "stop_token_ids": list(range(500_000))}),
    ("/v1/responses", {"input": "a", "logit_bias": {str(i): 1 for i in range(100_000)}}),
    ("/v1/batches", {"input_file_id": "x" * 1_000_000, "endpoint": "/v1/embeddings"}),
]


def test_they_are_refused(server: Attacked) -> None:
    with server.attacked():
        for path, body in ATTACKS:
            is_refused(server.post(path, body))
