"""GGUF files of the bundled model, written by the `gguf` package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("gguf")

from tools.to_gguf import write


@pytest.fixture(scope="session")
def bundled_gguf(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`bundled_gguf("Q8_0")` is the bundled model with matrices of that type, written once."""
    made: dict[str, Path] = {}

    def get(type: str = "F32") -> Path:
        if type not in made:
            made[type] = tmp_path_factory.mktemp("gguf") / f"tiny-{type}.gguf"
            write(bundled, made[type], type)
        return made[type]

    return get
