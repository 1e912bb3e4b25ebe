"""Fixtures of the tests of kernels."""

from __future__ import annotations

import pytest

from tests.native.machine import ISAS, MODULE, Machine

MACHINES = [(isa, threads) for isa in ISAS for threads in (1, 3) if threads == 3 or isa == ISAS[0]]
"""One thread with the best instruction set alone: how rows are shared out is the same in all of them."""


@pytest.fixture(params=MACHINES, ids=lambda p: f"{p[0]}-{p[1]}")
def machine(request: pytest.FixtureRequest) -> Machine:
    isa, threads = request.param
    return Machine(MODULE.Program(threads, isa))
