"""Row 12: half a million stop strings, pairs or ids are refused quickly: by how many values a body has, and by what a field may
have.  Long conversations stand in row 15.
"""

from __future__ import annotations

import time
from typing import Any

from tests.security.conftest import Attacked, is_refused

MANY = [f"s{i}" for i in range(500_000)]
SOME = MANY[:200_000]
"""So few that only their field's own bound is in the way."""
WORDS = {"prompt": "a", "max_tokens": 1}
SAY = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
ATTACKS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": "a"}], "stop_sequences": MANY}),
    ("/v1/responses", {"input": "a", "stop": MANY}),
    ("/v1/responses", {"input": "a", "metadata": dict.fromkeys(MANY, "x")}),
    ("/v1/responses", {"input": "a", "stop_token_ids": list(range(500_000))}),
    ("/v1/responses", {"input": "a", "logit_bias": {str(i): 1 for i in range(100_000)}}),
    *((path, {**body, name: value})
      for path, body in (("/v1/completions", WORDS), ("/v1/chat/completions", SAY))
      for name, value in (("stop", MANY), ("stop", SOME), ("bad_words", SOME), ("stop_token_ids", [7] * 500_000),
                          ("logit_bias", {str(i): 1 for i in range(4096)}))),
    ("/v1/messages", {**SAY, "stop_sequences": SOME}),
    ("/v1/responses", {"input": "a", "stop": SOME}),
    ("/v1/responses", {"input": "a", "stop_token_ids": [7] * 500_000}),
    ("/v1/batches", {"input_file_id": "x" * 1_000_000, "endpoint": "/v1/embeddings"}),
]  # fmt: skip


def test_they_are_refused(server: Attacked) -> None:
    with server.attacked():
        for path, body in ATTACKS:
            began = time.monotonic()
            is_refused(server.post(path, body))
            assert time.monotonic() - began < 10, "it was gone through"
