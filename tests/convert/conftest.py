"""The tokenizer that the tests of conversion share."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.front.text import ModelText


@pytest.fixture(scope="session")
def text(bundled: Path) -> ModelText:
    """The text side of the bundled model."""
    return ModelText.load(bundled, max_model_len=512, name="bundled")
