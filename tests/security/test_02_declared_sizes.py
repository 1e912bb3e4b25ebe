"""Row 2: a few hundred bytes that declare hundreds of GiB.  No field of a request declares the size of anything: a tensor is
refused under whatever name, and a checkpoint's declared sizes are compared with its file before anything is laid out.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import pytest

from tests.security.conftest import Attacked, is_refused
from weft.errors import ConfigError
from weft.models.checkpoints.stored import catalogue

BOMB = {"shape": [1 << 40, 1 << 20], "dtype": "float32", "indices": [[0], [0]], "values": [1.0], "layout": "sparse_coo"}


def test_in_a_request(server: Attacked) -> None:
    with server.attacked():
        for path, body in (
            ("/v1/completions", {"prompt": "a", "max_tokens": 1, "prompt_embeds": BOMB}),
            ("/v1/completions", {"prompt": BOMB, "max_tokens": 1}),
            ("/v1/embeddings", {"input": BOMB}),
            ("/v1/responses", {"input": [BOMB]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": [BOMB]}]}),
            ("/detokenize", {"tokens": BOMB}),
        ):
            is_refused(server.post(path, body))


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [([1 << 40, 1 << 20], [0, 8]), ([1 << 62, 4], [0, 0]), ([2], [0, 1 << 60]), ([1 << 63, 2], [0, 8]), ([-2], [0, 8])],
)
def test_in_a_checkpoint(tmp_path: Path, shape: list[int], offsets: list[int]) -> None:
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    tracemalloc.start()
    with pytest.raises(ConfigError):
        catalogue(tmp_path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20


def test_in_the_length_of_a_header(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ConfigError):
        catalogue(tmp_path)
