"""The figures of docs/quantization.md are those that the benchmark kept, and they keep what is said of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "quantization.md").read_text(encoding="utf8")
RECORDS: list[dict[str, Any]] = json.loads(
    (ROOT / "bench" / "results" / "quantization.json").read_text(encoding="utf8")
)["records"]


def record(weights: str, method: str, calibration: str = "a novel") -> dict[str, Any] | None:
    found = [
        r for r in RECORDS
        if r["weights"] == weights and r["method"] == method and r.get("calibration", calibration) == calibration
    ]  # fmt: skip
    assert len(found) <= 1
    return found[0] if found else None


def said(found: dict[str, Any] | None) -> list[str]:
    return ["", ""] if found is None else [f"{found['kl']:.5f}", f"{100 * found['top1']:.1f} %"]


def test_the_table_is_the_record() -> None:
    rows = re.findall(
        r"^\| (computed in bfloat16|`int[\w:]+`) \|(.*)\|$",
        PAGE.partition("`--activations int8` adds")[0],
        re.MULTILINE,
    )
    told = {r["weights"] for r in RECORDS if r["method"] == "nearest"}
    assert {name.strip("`") for name, _ in rows} - {"computed in bfloat16"} == told
    for name, rest in rows:
        cells = [cell.strip() for cell in rest.split("|")]
        if name == "computed in bfloat16":
            assert cells == ["16", *said(record("bfloat16", name)), "", ""]
            continue
        nearest = record(name.strip("`"), "nearest")
        assert nearest is not None
        assert float(cells[0]) == round(nearest["bits"], 3), name
        assert cells[1:] == [*said(nearest), *said(record(name.strip("`"), "awq"))], name


def test_what_rounded_inputs_cost_is_the_record_too() -> None:
    rows = re.findall(
        r"^\| `(int[\w:]+)` \| (.+ %) \| (.+ %) \|$", PAGE.partition("| inputs int8: divergence")[2], re.MULTILINE
    )
    assert {name for name, _, _ in rows} == {r["weights"] for r in RECORDS if r["method"] == "inputs int8"}
    for name, plain, rounded in rows:
        assert plain.split(" | ") == said(record(name, "inputs float")), name
        assert rounded.split(" | ") == said(record(name, "inputs int8")), name


def test_what_is_promised_of_them() -> None:
    """8 bits: at most 0.001 nats per token.  AWQ, calibrated on another text, below rounding to nearest in every format."""
    for r in RECORDS:
        assert r["tokens"] >= 10_000
        if r["weights"].startswith("int8") and r["method"] != "inputs int8":
            assert r["kl"] <= 0.001, r
        if r["method"] == "awq":
            nearest = record(r["weights"], "nearest")
            assert nearest is not None
            assert r["kl"] < nearest["kl"], r
    for weights, method in (("int8:16", "nearest"), ("int8:32:zero", "nearest"), ("int8:32", "awq")):
        found = record(weights, method)
        assert found is not None
        assert found["top1"] >= 0.99, weights
    assert {r["calibration"] for r in RECORDS if r["method"] == "awq"} >= {"a novel", "an encyclopedia"}
