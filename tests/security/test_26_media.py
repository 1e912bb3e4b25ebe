"""Row 26: weft decodes no media.  Malformed images, whatever they are called, are refused unread, in weft's own words."""

from __future__ import annotations

import base64
from typing import Any

from tests.security.conftest import Attacked, is_refused

BROKEN = {
    "image/png": b"\x89PNG\r\n\x1a\n" + b"\xff" * 64,
    "image/jpeg": b"\xff\xd8\xff\xe0" + b"\x00" * 64,
    "image/jp2": b"\x00\x00\x00\x0cjP  \r\n\x87\n" + b"\xff" * 64,
    "image/tiff": b"II*\x00" + b"\xff" * 64,
    "image/svg+xml": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "audio/wav": b"RIFF\xff\xff\xff\xffWAVE",
    "video/mp4": b"\x00\x00\x00\x18ftypmp42",
    "application/pdf": b"%PDF-1.7\n" + b"\xff" * 64,
}
LEAKS = ("PIL", "cannot identify", "BytesIO", "object at", "cv2", "ffmpeg", "root:")


def forms(kind: str, data: bytes) -> list[dict[str, Any]]:
    """A part of a message in every way in which some API writes one."""
    text = base64.b64encode(data).decode()
    url = f"data:{kind};base64,{text}"
    return [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
        {"type": "image", "source": {"type": "base64", "media_type": kind, "data": text}},
        {"type": "document", "source": {"type": "base64", "media_type": kind, "data": text}},
        {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": url}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "file", "file": {"file_data": url, "filename": "x"}},
        {"type": "input_file", "file_data": url, "filename": "x"},
    ]


def refused_everywhere(server: Attacked, part: dict[str, Any]) -> None:
    """In chat, responses, messages and the counting of tokens, alone and beside text."""
    for content in ([part], [{"type": "text", "text": "a"}, part]):
        turn = [{"role": "user", "content": content}]
        for path, body in (
            ("/v1/chat/completions", {"messages": turn, "max_tokens": 1}),
            ("/v1/responses", {"input": turn, "max_output_tokens": 1}),
            ("/v1/messages", {"messages": turn, "max_tokens": 1}),
            ("/v1/messages/count_tokens", {"messages": turn}),
            ("/tokenize", {"messages": turn}),
        ):
            answer = server.post(path, body)
            is_refused(answer)
            assert not [leak for leak in LEAKS if leak in answer.text]


def test_they_are_refused_unread(server: Attacked) -> None:
    with server.attacked():
        for kind, data in BROKEN.items():
            for part in forms(kind, data):
                refused_everywhere(server, part)
