"""Checkpoints and a tokenizer that the tests of conversion share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.checkpoints import Checkpoint, make
from weft.front.text import ModelText


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A function that makes (once) and returns the named variant."""
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def text(bundled: Path) -> ModelText:
    """The text side of the bundled model."""
    return ModelText.load(bundled, max_model_len=512, name="bundled")
