"""Row 25: an address that stands in text, as Markdown does it, is text and nothing else."""

from __future__ import annotations

from tests.security.canary import canary
from tests.security.conftest import Attacked


def test_a_link_in_text_is_not_followed(server: Attacked) -> None:
    with canary() as bird, server.attacked():
        for url in bird.addresses:
            text = f"![a]({url}) [b]({url}) <img src='{url}'> {url}"
            turn = [{"role": "user", "content": text}]
            for path, body in (
                ("/v1/chat/completions", {"messages": turn, "max_tokens": 1}),
                ("/v1/completions", {"prompt": text, "max_tokens": 1}),
                ("/v1/responses", {"input": text, "max_output_tokens": 1}),
                ("/v1/messages", {"messages": turn, "max_tokens": 1}),
                ("/v1/embeddings", {"input": text}),
            ):
                assert server.post(path, body).status_code == 200
