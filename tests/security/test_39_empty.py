"""Row 39: nothing where something is wanted: empty texts, lists, lists of empty lists, null."""

from __future__ import annotations

from typing import Any

from tests.security.conftest import Attacked, is_refused

NOTHING: list[Any] = ["", None, [], [[]], {}, [None], [{}], 0, False]
FIELDS = [
    ("/v1/responses", "input", {}),
    ("/v1/embeddings", "input", {}),
    ("/v1/messages", "messages", {"max_tokens": 2}),
    ("/v1/messages/count_tokens", "messages", {}),
    ("/v1/batches", "input_file_id", {"endpoint": "/v1/embeddings"}),
    ("/v1/batches", "endpoint", {"input_file_id": "file-x"}),
]


def test_they_are_refused(server: Attacked) -> None:
    with server.attacked():
        for path, name, rest in FIELDS:
            for value in NOTHING:
                is_refused(server.post(path, {**rest, name: value}))
            is_refused(server.http.post(path, content=b"", headers={"content-type": "application/json"}))


def test_empty_contents(server: Attacked) -> None:
    """Blocks and items without text: refused, or an answer to a turn that says nothing; never a crash."""
    with server.attacked():
        for content in ("", [], [{"type": "text", "text": ""}], None, [{}], [{"type": "text"}]):
            turn = [{"role": "user", "content": content}]
            for path, body in (
                ("/v1/messages", {"messages": turn, "max_tokens": 1}),
                ("/v1/responses", {"input": turn, "max_output_tokens": 1}),
            ):
                answer = server.post(path, body)
                if answer.status_code != 200:
                    is_refused(answer)
