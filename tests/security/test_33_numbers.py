"""Row 33: every number has its bounds: negative, huge and fractional ones are refused, in bodies and in queries."""

from __future__ import annotations

from typing import Any

from tests.security.conftest import Attacked, is_refused

SAY = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
FIELDS: list[tuple[str, dict[str, Any], str, list[Any]]] = [
    ("/v1/responses", {"input": "a"}, "max_output_tokens", [-1, 0, 1 << 63, 1 << 200, 1.5, "9", True]),
    ("/v1/responses", {"input": "a"}, "temperature", [-1, 1e308, "1"]),
    ("/v1/responses", {"input": "a"}, "top_p", [-0.1, 0, 1.1]),
    ("/v1/responses", {"input": "a"}, "top_logprobs", [-1, 21, 1 << 31]),
    ("/v1/responses", {"input": "a"}, "priority", [1 << 31, -(1 << 40), 0.5]),
    ("/v1/responses", {"input": "a"}, "seed", [1 << 64, -(1 << 64)]),
    ("/v1/messages", SAY, "max_tokens", [-1, 0, 1 << 63, 1.5]),
    ("/v1/messages", SAY, "top_k", [-2, 1 << 40]),
    ("/v1/messages", SAY, "temperature", [-1, 1e9]),
    ("/v1/embeddings", {"input": "a"}, "dimensions", [-1, 0, 1 << 62, 0.5]),
    ("/v1/embeddings", {"input": "a"}, "priority", [1 << 31, -(1 << 40)]),
    ("/v1/embeddings", {}, "input", [[-1], [1 << 62], [[-5]], [4096]]),
]
QUERIES = [
    "limit=-1",
    "limit=0",
    "limit=99999999999999",
    "limit=1e3",
    "limit=",
    "limit=%00",
    "limit=\u0661",
    "order=sideways",
]


def test_bodies(server: Attacked) -> None:
    with server.attacked():
        for path, body, name, values in FIELDS:
            for value in values:
                is_refused(server.post(path, {**body, name: value}))


def test_queries(server: Attacked) -> None:
    with server.attacked():
        for query in QUERIES:
            is_refused(server.http.get(f"/v1/files?{query}"))
            if not query.startswith("order"):
                is_refused(server.http.get(f"/v1/batches?{query}"))
        made = server.post("/v1/responses", {"input": "a", "max_output_tokens": 1}).json()["id"]
        for query in (*QUERIES, "after=x"):
            is_refused(server.http.get(f"/v1/responses/{made}/input_items?{query}"))
        is_refused(server.http.get(f"/v1/responses/{made}?stream=true&starting_after=-1"))
