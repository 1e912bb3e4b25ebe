"""The bundled model with what its tokens stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.vocabulary import VocabularyShelf
from weft.front.text import ModelText


@pytest.fixture(scope="session")
def text(bundled: Path) -> ModelText:
    return ModelText.load(bundled)


@pytest.fixture(scope="session")
def words(text: ModelText) -> VocabularyShelf:
    return VocabularyShelf(text.vocabulary)


@pytest.fixture(scope="session")
def runtime(bundled: Path, text: ModelText) -> Runtime:
    config = EngineConfig(model=bundled, dtype="float32", max_model_len=768, max_num_seqs=32, device="cpu", threads=1)
    return build(prepare(config), vocabulary=text.vocabulary)
