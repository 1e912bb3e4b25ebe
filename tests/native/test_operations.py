"""The benchmark of the kernels leaves none of them out, and what it keeps holds each beside its limit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.harness import RESULTS
from bench.operations import between, entries, products, timing
from bench.operations.__main__ import PARTS, beside
from tests.native.machine import MODULE

LIMITS = {"read", "arithmetic"}
"""What the others are held against."""
NO_KERNELS = {"run", "isa", "threads"}
KERNELS = {name for name in dir(MODULE.Program) if not name.startswith("_")} - LIMITS - NO_KERNELS
SMALL: dict[Any, dict[str, Any]] = {
    timing: {"SECONDS": 0.0, "ROUNDS": 1, "READ_BYTES": 1 << 20, "TURNS": 1000},
    products: {
        "SPREAD": 1 << 16, "WIDTH": 128, "INNER": 64, "SHAPES": {"gate_up": (128, 128), "down": (128, 64)},
        "FORMATS": ("float32", "int4:32"), "ROWS": (1, 5), "MIXTURE": (128, 64, 4, 2),
    },
    entries: {"SPREAD": 1 << 16, "CONTEXTS": ((1, 64), (2, 32))},
    between: {"INNER": 64, "VOCAB": 304},
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, values in SMALL.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


@pytest.mark.usefixtures("small")
def test_every_kernel_is_measured_beside_the_limit() -> None:
    bench = timing.Bench(MODULE, 1, "auto")
    parts = [list(part(bench)) for part in PARTS.values()]
    found = [record for part in parts for record in part]
    names = [{record["operation"] for record in part} for part in parts]
    assert sum(map(len, names)) == len(set().union(*names)), (
        "a part that is run alone takes the place of its operations"
    )
    assert {record["kernel"] for record in found} == KERNELS
    for record in found:
        assert min(record[key] for key in ("seconds", "limit_s", "fraction", "gb_s", "read_gb_s")) > 0, record
    sparse = next(record for record in found if record["kernel"] == "attend_sparse")
    # Half of the pairs, each of which is 64 multiplications and additions for a score and as many for its value, by 14 heads.
    pairs = sum(range(8192 - 512 + 1, 8192 + 1)) / 2
    assert sparse["gop_s"] * sparse["seconds"] * 1e9 == pytest.approx(pairs * 4 * 64 * 14)


def test_what_is_kept_has_every_kernel() -> None:
    kept = json.loads((RESULTS / "operations.json").read_text())["results"]
    assert {record["kernel"] for record in kept} == KERNELS


def test_a_part_takes_its_own_place_among_the_others() -> None:
    def records(*names: str, n: int = 0) -> list[dict[str, Any]]:
        return [{"operation": name, "n": n} for name in names]

    kept = records("product", "route", "experts", "route", "experts", "draw")
    new = records("route", "experts", n=1)
    assert beside(kept, new) == [*records("product"), *new, *records("draw")]
    assert beside(records("product"), new) == [*records("product"), *new]
