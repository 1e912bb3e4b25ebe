"""Fixtures of the tests of kernels."""

from __future__ import annotations

import pytest

from tests.native.machine import ISAS, MODULE, Machine


@pytest.fixture(params=[(isa, threads) for isa in ISAS for threads in (1, 3)], ids=lambda p: f"{p[0]}-{p[1]}")
def machine(request: pytest.FixtureRequest) -> Machine:
    isa, threads = request.param
    return Machine(MODULE.Program(threads, isa))
