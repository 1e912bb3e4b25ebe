"""The operations on which the model tests run."""

from __future__ import annotations

import pytest

from tests.models import harness


@pytest.fixture(params=["auto", "ref"], ids=["kernels", "reference"])
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of a decoder runs on the kernels and on the reference operations: it names this fixture."""
    chosen: str = request.param
    monkeypatch.setattr(harness, "OPS", chosen)
    return chosen
