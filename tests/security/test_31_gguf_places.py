"""Row 31: a tensor whose place or size leads past the end of its file is never read; no route makes or sends models.

In whoever reads past the end the neighbour's memory becomes weights, and goes out again with the next copy of the model.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from tests.gguf.forge import model, string
from tests.security.conftest import ADMIN, Attacked, is_refused
from tests.security.files import fails_alone, refused
from weft.errors import ConfigError
from weft.models.gguf.header import read
from weft.native import __file__ as native


def placed(offset: int, count: int = 8) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    head += string("t") + struct.pack("<IQIQ", 1, count, 0, offset)
    return head + bytes(-len(head) % 32) + bytes(64)


PAST = [(64, 8), (32, 16), (0, 17), (1 << 20, 8), ((1 << 64) - 32, 8), ((1 << 63), 8), (64, 1), (0, 1 << 60)]


@pytest.mark.parametrize(("offset", "count"), PAST)
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


def test_a_server_does_not_begin_with_them(tmp_path: Path, server: Attacked) -> None:
    path = tmp_path / "x.gguf"
    with server.attacked():
        for offset, count in PAST[::3]:
            path.write_bytes(placed(offset, count))
            assert "ends at byte" in refused(tmp_path, str(path))
        assert "ends at byte" in refused(tmp_path, "bundled", str(path))


def test_a_file_that_gets_shorter_while_it_is_served(pair: tuple[Attacked, Path]) -> None:
    """Its engine goes on, having no page of it in use, and is not started again from what is left."""
    server, path = pair
    os.truncate(path, path.stat().st_size - 3000)
    with server.attacked():
        for _ in range(5):
            answer = server.post("/v1/completions", {"model": path.stem, "prompt": "ab", "max_tokens": 20})
            assert answer.status_code == 200
    fails_alone(server, path.stem, "ends at byte")


def adapter(tensors: dict[str, object], data: bytes = bytes(64)) -> bytes:
    """A safetensors file with this head."""
    head = json.dumps(tensors).encode()
    return struct.pack("<Q", len(head)) + head + data


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def one(shape: list[int], start: int, stop: int, dtype: str = "F32") -> bytes:
    tensors: dict[str, object] = {NAME: {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}}
    return adapter(tensors, bytes(min(stop, 64)))


LIES = [
    one([16], 64, 128), one([16], 0, 128), one([16], 1 << 62, (1 << 62) + 64), one([16], 64, 0), one([1 << 62], 0, 64),
    one([1 << 32, 1 << 32], 0, 0), one([(1 << 64) - 1, 1], 0, 64), one([0, 1 << 62, 1 << 62], 0, 0),
    one([0, (1 << 64) - 1], 0, 0), one([1 << 63, 2], 0, 0), one([0] * 65, 0, 0), one([1] * 5000, 0, 4), one([16, -1], 0, 64),
    struct.pack("<Q", (1 << 64) - 1) + b"{}", struct.pack("<Q", 1 << 62), b"", model().bytes(),
]  # fmt: skip


def test_a_running_server_reads_none_as_an_adapter(server: Attacked) -> None:
    """The one kind of file with tensors that a server takes while it runs; GGUF files are none, whatever their name."""
    folder = server.folder.parent / "adapters" / "lies"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    headers = {"authorization": f"Bearer {ADMIN}"}
    try:
        with server.attacked():
            for data in LIES:
                (folder / "adapter_model.safetensors").write_bytes(data)
                body = {"lora_name": "lies", "lora_path": "lies"}
                answer = server.post("/v1/load_lora_adapter", body, headers=headers)
                is_refused(answer)
                assert "weft failed" not in answer.text
    finally:
        shutil.rmtree(folder)
