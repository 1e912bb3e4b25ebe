"""Row 27: images of one pixel, of none, or of sizes that do not fit crash nothing: weft takes none of any size."""

from __future__ import annotations

import struct
import zlib

from tests.security.conftest import Attacked
from tests.security.test_26_media import forms, refused_everywhere

SIZES = [(1, 1), (0, 0), (1, 0), (2, 1), (1, 65_535), (1 << 31, 1 << 31), (28, 27)]


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def test_they_are_refused(server: Attacked) -> None:
    with server.attacked():
        for width, height in SIZES:
            for part in forms("image/png", png(width, height))[:4]:
                refused_everywhere(server, part)
