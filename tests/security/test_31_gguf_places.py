"""Row 31: a tensor whose place or size leads past the end of its file is never read; no route makes or sends models.

In whoever reads past the end the neighbour's memory becomes weights, and goes out again with the next copy of the model.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.gguf.forge import model, string
from tests.security.conftest import Attacked
from weft.errors import ConfigError
from weft.models.gguf.header import read
from weft.native import __file__ as native


def placed(offset: int, count: int = 8) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    head += string("t") + struct.pack("<IQIQ", 1, count, 0, offset)
    return head + bytes(-len(head) % 32) + bytes(64)


@pytest.mark.parametrize(
    ("offset", "count"),
    [(64, 8), (32, 16), (0, 17), (1 << 20, 8), ((1 << 64) - 32, 8), ((1 << 63), 8), (64, 1), (0, 1 << 60)],
)
def test_past_the_end(tmp_path: Path, offset: int, count: int) -> None:
    (tmp_path / "x.gguf").write_bytes(placed(offset, count))
    with pytest.raises(ConfigError, match="ends at byte"):
        read(tmp_path / "x.gguf")


def test_up_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(placed(32, 8))
    entry = read(tmp_path / "x.gguf").tensors["t"]
    assert entry.stop == (tmp_path / "x.gguf").stat().st_size


def test_every_shorter_file_is_refused(tmp_path: Path) -> None:
    """A whole model, cut anywhere in its data."""
    path = model().write(tmp_path / "x.gguf")
    whole = path.read_bytes()
    for cut in range(len(whole) - 4096, len(whole), 97):
        path.write_bytes(whole[:cut])
        with pytest.raises(ConfigError):
            read(path)


def test_files_are_mapped_to_be_read() -> None:
    """No map of a checkpoint is writable: the one flag for that is nowhere in the tree."""
    package = Path(native).parents[1]
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert "ACCESS_WRITE" not in text
        assert "PROT_WRITE" not in text or "native" in path.parts, path


def test_models_are_neither_made_nor_sent(server: Attacked) -> None:
    with server.attacked():
        for path in (
            "/api/create",
            "/api/push",
            "/api/pull",
            "/api/copy",
            "/api/delete",
            "/api/blobs/sha256:0",
            "/v1/models",
        ):
            assert server.post(path, {"name": "x", "from": "y"}).status_code in (404, 405)
            assert server.http.request("DELETE", path).status_code in (404, 405)
