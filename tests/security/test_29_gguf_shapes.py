"""Row 29: dimensions of a GGUF file whose product wraps in 32 or 64 bits are multiplied without wrapping, and held to the file.

Read as `weft serve` reads them, served beside a running server, and put in the place of a model that runs.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from tests.gguf.forge import string
from tests.security.conftest import Attacked
from tests.security.files import fails_alone, refused
from weft.errors import ConfigError
from weft.models.gguf.header import read

WRAPS = [
    (1 << 32, 1 << 32), (1 << 31, 2), ((1 << 32) + 8, 1), (1 << 62, 4), (1 << 63, 2), ((1 << 64) - 1, 1),
    (1 << 16, 1 << 16, 1 << 16, 1 << 16),
    ((1 << 64) - 4, 1), (3037000500, 3037000500), (8, (1 << 61) + 1),
]  # fmt: skip


def tensor(dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """A file with one tensor of this shape and 64 bytes of data."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    head += string("t") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return head + bytes(-len(head) % 32) + bytes(64)


@pytest.mark.parametrize("dims", WRAPS, ids=str)
@pytest.mark.parametrize("kind", [0, 1, 8, 12])
def test_products_that_wrap(tmp_path: Path, dims: tuple[int, ...], kind: int) -> None:
    """In types of 4 and 2 bytes a value, and of blocks."""
    (tmp_path / "x.gguf").write_bytes(tensor(dims, kind))
    with pytest.raises(ConfigError, match=r"ends at byte|stores"):
        read(tmp_path / "x.gguf")


def test_shape_times_type_is_what_is_read(tmp_path: Path) -> None:
    for dims, kind, size in (((16,), 0, 64), ((32,), 1, 64), ((32,), 8, 34), ((4, 4), 0, 64)):
        (tmp_path / "x.gguf").write_bytes(tensor(dims, kind))
        entry = read(tmp_path / "x.gguf").tensors["t"]
        assert entry.stop - entry.start == size
    for dims, kind in (((17,), 0), ((33,), 1), ((64,), 8)):
        (tmp_path / "x.gguf").write_bytes(tensor(dims, kind))
        with pytest.raises(ConfigError):
            read(tmp_path / "x.gguf")


def test_a_server_does_not_begin_with_them(tmp_path: Path, server: Attacked) -> None:
    """Neither alone nor beside a good model; a server that runs does not notice."""
    path = tmp_path / "x.gguf"
    with server.attacked():
        for dims in WRAPS[::3]:
            path.write_bytes(tensor(dims))
            assert "ends at byte" in refused(tmp_path, str(path))
        assert "ends at byte" in refused(tmp_path, "bundled", str(path))


def test_a_running_server_lives_on_without_the_model(pair: tuple[Attacked, Path], tmp_path: Path) -> None:
    server, path = pair
    (tmp_path / "new").write_bytes(tensor((1 << 32, 1 << 32)))
    os.replace(tmp_path / "new", path)
    fails_alone(server, path.stem, "ends at byte")
