"""One bundled model with room for long contexts, and what its answers are compared with."""

from __future__ import annotations

import pytest

from tests.exec.conftest import STORY
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    config = EngineConfig(
        model=resolve(None), dtype="float32", max_model_len=4096, max_num_seqs=16, device="cpu", threads=1
    )
    return build(prepare(config))


@pytest.fixture(scope="session")
def layered_runtime() -> Runtime:
    """The same model with room for parked hidden states."""
    config = EngineConfig(
        model=resolve(None), dtype="float32", max_model_len=1024, max_num_seqs=16, device="cpu", threads=1,
        techniques=["schedule=layered"],
    )  # fmt: skip
    return build(prepare(config))


@pytest.fixture(scope="session")
def ids() -> list[int]:
    """Ids of a story, twice: the second time prompt lookup guesses right."""
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False) * 2
