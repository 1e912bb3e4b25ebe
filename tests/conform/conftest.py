"""One laboratory for all generated tests: what a stack gave is computed once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from weft.conform.lab import Lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    return Lab()
