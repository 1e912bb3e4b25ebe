"""Row 30: counts and lengths of a GGUF header that overflow, noise, and keys that stand there twice end in one sentence."""

from __future__ import annotations

import os
import random
import struct
import time
import tracemalloc
from pathlib import Path

import pytest

from tests.gguf.forge import ARRAY, STRING, U32, Forge, model, string
from tests.security.conftest import Attacked
from tests.security.files import fails_alone, refused
from weft.errors import ConfigError
from weft.front.text import ModelText
from weft.models import load_spec
from weft.models.gguf.header import read

TOP = [1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 32]


def lies() -> list[bytes]:
    found = []
    for huge in TOP:
        packed = struct.pack("<Q", huge)
        found.append(b"GGUF" + struct.pack("<I", 3) + packed + struct.pack("<Q", 0))
        found.append(b"GGUF" + struct.pack("<IQ", 3, 0) + packed)
        found.append(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + packed + b"key")
        found.append(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("key") + struct.pack("<I", STRING) + packed + b"x")
        for kind in (0, U32, STRING, ARRAY):
            found.append(
                b"GGUF"
                + struct.pack("<IQQ", 3, 0, 1)
                + string("key")
                + struct.pack("<II", ARRAY, kind)
                + packed
                + b"x" * 64
            )
        found.append(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + packed + b"t")
    return found


def test_counts_that_overflow(tmp_path: Path) -> None:
    tracemalloc.start()
    for data in lies():
        (tmp_path / "x.gguf").write_bytes(data)
        with pytest.raises(ConfigError):
            read(tmp_path / "x.gguf")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 << 20


def test_keys_twice(tmp_path: Path) -> None:
    for same in ([("a", U32, 1), ("a", U32, 1)], [("a", U32, 1), ("b", U32, 1), ("a", STRING, "x")]):
        with pytest.raises(ConfigError, match="twice"):
            read(Forge(same).write(tmp_path / "x.gguf"))
    with pytest.raises(ConfigError, match="two tensors"):
        read(Forge([("a", U32, 1)], [("t", (2,), 0, None), ("t", (2,), 0, None)]).write(tmp_path / "x.gguf"))


@pytest.mark.parametrize("seed", range(4))
def test_noise(tmp_path: Path, seed: int) -> None:
    """Bytes of a good file changed, cut, doubled and mixed: read, or refused in a sentence, and quickly."""
    rng, good = random.Random(seed), model().bytes()
    began = time.monotonic()
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.randint(1, 12)):
            at = rng.randrange(len(data) if rng.random() < 0.3 else 2000)
            match rng.randrange(4):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    data[at : at + 8] = struct.pack("<Q", rng.choice(TOP))
                case 2:
                    del data[at : at + rng.randint(1, 64)]
                case 3:
                    data[at:at] = data[rng.randrange(len(data)) :][: rng.randint(1, 64)]
        path = tmp_path / "x.gguf"
        path.write_bytes(data)
        try:
            read(path)
            load_spec(path)
            ModelText.load(path)
        except ConfigError:
            pass
    assert time.monotonic() - began < 60


def test_a_server_does_not_begin_with_them(tmp_path: Path, server: Attacked) -> None:
    path = tmp_path / "x.gguf"
    twice = Forge([("a", U32, 1), ("a", U32, 1)]).bytes()
    with server.attacked():
        for data in [*lies()[-9::2], twice, b"GGUF"]:
            path.write_bytes(data)
            assert str(path) in refused(tmp_path, str(path))
        assert str(path) in refused(tmp_path, "bundled", str(path))


def test_a_running_server_lives_on_without_the_model(pair: tuple[Attacked, Path], tmp_path: Path) -> None:
    """A string of 2^62 bytes in the place of the first key's."""
    server, path = pair
    data = bytearray(path.read_bytes())
    data[24:32] = struct.pack("<Q", 1 << 62)
    (tmp_path / "new").write_bytes(data)
    os.replace(tmp_path / "new", path)
    fails_alone(server, path.stem, "the length of a metadata key is 4611686018427387904")
