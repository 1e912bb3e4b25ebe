"""Row 24: images, sounds and films are refused in every form in which a client may send them; nothing is decoded."""

from __future__ import annotations

import base64
from typing import Any

from tests.security.conftest import Attacked, is_refused

PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0" * 64).decode()
DATA = f"data:image/png;base64,{PIXEL}"
PARTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"type": "image_url", "image_url": {"url": DATA}}),
    ("/v1/chat/completions", {"type": "input_audio", "input_audio": {"data": PIXEL, "format": "wav"}}),
    (
        "/v1/chat/completions",
        {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join([PIXEL] * 50)}},
    ),
    ("/v1/responses", {"type": "input_image", "image_url": DATA}),
    ("/v1/responses", {"type": "input_image", "file_id": "file-x"}),
    ("/v1/responses", {"type": "input_file", "file_data": DATA, "filename": "../a.pdf"}),
    ("/v1/messages", {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}),
    (
        "/v1/messages",
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PIXEL}},
    ),
]


def test_they_are_refused(server: Attacked) -> None:
    with server.attacked():
        for path, part in PARTS:
            turn = [{"role": "user", "content": [part]}]
            body = {"input": turn} if path == "/v1/responses" else {"messages": turn, "max_tokens": 2}
            is_refused(server.post(path, body))


def test_an_uploaded_image_is_only_kept(server: Attacked) -> None:
    with server.attacked():
        made = server.http.post(
            "/v1/files", files={"file": ("a.png", b"<svg onload=alert(1)>")}, data={"purpose": "vision"}
        ).json()
        answer = server.http.get(f"/v1/files/{made['id']}/content")
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-disposition"].startswith("attachment")
