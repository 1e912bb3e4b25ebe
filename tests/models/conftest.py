"""Checkpoints that the model tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.models import harness
from tests.models.checkpoints import Checkpoint, make


@pytest.fixture(params=["auto", "ref"], ids=["kernels", "reference"], autouse=True)
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of a decoder runs on the kernels and on the reference operations."""
    chosen: str = request.param
    monkeypatch.setattr(harness, "OPS", chosen)
    return chosen


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A function that makes (once) and returns the named variant."""
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get
