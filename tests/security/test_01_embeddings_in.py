"""Row 1: tensors from clients, such as a pickled sparse one with indices out of range, are refused unread: weft takes none."""

from __future__ import annotations

import base64
import io
import zipfile
from typing import Any

import pytest

from tests.security.conftest import Attacked, is_refused

SAY = [{"role": "user", "content": "a"}]
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
    ("/v1/completions", {"prompt": [], "max_tokens": 1}),
    ("/v1/chat/completions", {"messages": SAY, "max_tokens": 1}),
    ("/v1/responses", {"input": "a", "max_output_tokens": 1}),
    ("/v1/messages", {"messages": SAY, "max_tokens": 1}),
    ("/v1/embeddings", {"input": "a"}),
    ("/tokenize", {"prompt": "a"}),
]


def packed() -> str:
    """What torch.save writes: a zip with a pickle that would run a command."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch weft-was-here'\ntR.")
        file.writestr("archive/data/0", b"\xff" * 64)
    return base64.b64encode(out.getvalue()).decode()


@pytest.mark.parametrize("value", [packed(), [packed()], {"data": packed()}, "x", [[0.5] * 64]], ids=range(5))
def test_no_route_reads_them(server: Attacked, value: Any) -> None:
    with server.attacked():
        for path, body in ROUTES:
            is_refused(server.post(path, {**body, "prompt_embeds": value}))


def test_none_as_parts_of_a_message(server: Attacked) -> None:
    with server.attacked():
        for kind in ("prompt_embeds", "image_embeds", "audio_embeds"):
            part = {"type": kind, kind: packed()}
            for path, body in (
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}]}),
                ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": [part]}]}),
                ("/v1/responses", {"input": [{"role": "user", "content": [part]}]}),
            ):
                is_refused(server.post(path, body))
