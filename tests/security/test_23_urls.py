"""Row 23: addresses of images, files and redirects, in whatever spelling, are never fetched."""

from __future__ import annotations

from typing import Any

from tests.security.canary import canary
from tests.security.conftest import Attacked, is_refused


def bodies(url: str) -> list[tuple[str, dict[str, Any]]]:
    """The same address in every place where one of the APIs has room for one."""

    def said(part: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [part]}]

    source = {"type": "url", "url": url}
    return [
        ("/v1/responses", {"input": said({"type": "input_image", "image_url": url})}),
        ("/v1/responses", {"input": said({"type": "input_file", "file_url": url})}),
        ("/v1/responses", {"input": [{"type": "computer_call_output", "call_id": "a", "output": {"image_url": url}}]}),
        ("/v1/responses", {"input": "a", "tools": [{"type": "mcp", "server_url": url, "server_label": "x"}]}),
        ("/v1/chat/completions", {"messages": said({"type": "image_url", "image_url": {"url": url}})}),
        ("/v1/messages", {"max_tokens": 2, "messages": said({"type": "image", "source": source})}),
        ("/v1/messages", {"max_tokens": 2, "messages": said({"type": "document", "source": source})}),
        ("/v1/messages", {"max_tokens": 2, "messages": said({"type": "text", "text": "a"}),
                          "mcp_servers": [{"type": "url", "url": url, "name": "x"}]}),
        ("/v1/messages/count_tokens", {"messages": said({"type": "image", "source": source})}),
    ]  # fmt: skip


def test_no_address_is_fetched(server: Attacked) -> None:
    with canary() as bird, server.attacked():
        for url in bird.addresses:
            for path, body in bodies(url):
                is_refused(server.post(path, body))
