"""Row 28: a video of thousands of frames in one address is refused as any video is, and costs no more than its bytes."""

from __future__ import annotations

import base64

from tests.security.conftest import Attacked, is_refused

FRAME = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(300)).decode()


def test_they_are_refused(server: Attacked) -> None:
    url = "data:video/jpeg;base64," + ",".join([FRAME] * 20_000)
    parts = [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "video", "video": [url] * 2},
    ]
    with server.attacked():
        for part in parts:
            turn = [{"role": "user", "content": [part]}]
            is_refused(server.post("/v1/chat/completions", {"messages": turn, "max_tokens": 1}))
            is_refused(server.post("/v1/responses", {"input": turn}))
            is_refused(server.post("/v1/messages", {"messages": turn, "max_tokens": 1}))
