"""One bundled model for the tests of drafts."""

from __future__ import annotations

import pytest

from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.hub import resolve


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    config = EngineConfig(
        model=resolve(None), dtype="float32", max_model_len=1024, max_num_seqs=64, device="cpu", threads=1
    )
    return build(prepare(config))
