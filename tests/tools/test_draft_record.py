"""The record of drafts keeps what is promised of them, and holds no row that a newer one supersedes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.draft import rows, whole
from bench.draft.rows import decided_today, keep, superseded, table

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "draft.json"
FLOOR, BEST = 0.97, 1.8
NOT_DRAFTS = ("none", "perfect")


@pytest.fixture(scope="module")
def record() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(RECORD.read_text())["rows"]
    return found


@pytest.fixture(scope="module")
def today(record: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that the controller decided as it is: where it was altered, none until they are taken again."""
    found = [row for row in record if decided_today(row)]
    if not found:
        pytest.skip("the controller is another than that of the rows; `python -m bench.draft.table` takes them again")
    assert {row["batch"] for row in found} == {1, 2, 4, 8, 16, 32}
    return found


def load(row: dict[str, Any]) -> str:
    return f"{row['draft']}, {row['prompts']} at {row['temperature']:g}, {row['batch']} at once: {row['ratio']:.3f}"


def test_with_the_controller_nothing_takes_longer_than_the_floor_allows(today: list[dict[str, Any]]) -> None:
    assert [load(row) for row in today if row["ratio"] < FLOOR] == []


@pytest.mark.parametrize("temperature", [0.8, 0.0])
@pytest.mark.parametrize("text", ["prose", "spec-bench"])
def test_one_sequence_goes_nearly_twice_as_fast_by_the_best_exact_draft(
    today: list[dict[str, Any]], text: str, temperature: float
) -> None:
    exact = [
        row["ratio"]
        for row in today
        if (row["prompts"], row["temperature"], row["batch"], row["accept"]) == (text, temperature, 1, "race")
        and row["draft"] not in NOT_DRAFTS
    ]
    assert max(exact) >= BEST


def test_tokens_were_those_of_plain_decoding_and_greedy_answers_do_not_loop(record: list[dict[str, Any]]) -> None:
    assert [load(row) for row in record if not row["same_tokens"]] == []
    assert [load(row) for row in record if row["temperature"] == 0 and row["repeated_8grams"] >= 0.2] == []


def test_the_record_has_no_row_that_is_superseded_and_the_page_is_its(record: list[dict[str, Any]]) -> None:
    assert [load(row) for row in record if superseded(row, record)] == []
    assert RECORD.with_suffix(".md").read_text() == f"# Drafts\n\n{table(record)}\n"


def row(**given: Any) -> dict[str, Any]:
    return {
        "draft": "clover(guesses=4)", "accept": "race", "batch": 2, "prompts": "prose", "temperature": 0.8, "controller": True,
        "threads": 2, "draft_share": 0.004, "decided_by": whole.decided_by(), "date": "2026-11-28",
    } | given  # fmt: skip


def test_a_newer_row_of_the_same_load_and_technique_supersedes() -> None:
    new = row()
    for old, gone in (
        ({"date": "2026-11-27"}, True),
        ({"decided_by": "another"}, True),
        ({"date": "2026-11-27", "draft_share": 0.007}, True),
        ({"date": "2026-11-27", "draft_share": 0.007, "draft": "clover(guesses=8)"}, True),
        ({"date": "2026-11-27", "draft": "clover(guesses=8)"}, False),
        ({"date": "2026-11-27", "draft": "ngram"}, False),
        ({"date": "2026-11-29"}, False),
        ({}, False),
        *(
            ({"date": "2026-11-27", k: v}, False)
            for k, v in (("batch", 4), ("controller", False), ("prompts", "random"))
        ),
    ):
        assert superseded(row(**old), [new, row(**old)]) is gone, old
    assert not superseded(row(date="2026-11-27"), [row(decided_by="another")]), (
        "nor by what an older controller decided"
    )


def test_what_is_kept_is_written_in_its_order_and_told_beside(tmp_path: Path) -> None:
    figures = {
        "ratio": 1.5,
        "ratio_spread": [1.4, 1.6],
        "tok_per_step": 2.0,
        "acceptance": None,
        "predicted_acceptance": None,
    }
    figures |= {"draft_time": None, "repeated_8grams": 0.0, "cpu": "A processor"}
    old, new, other = (row(**figures, **x) for x in ({"date": "2026-11-27"}, {}, {"draft": "clover(guesses=2)"}))
    keep(tmp_path / "draft.json", [old, new, other], "a command", {"cores": 2})
    kept = json.loads((tmp_path / "draft.json").read_text())
    assert kept == {"command": "a command", "machine": {"cores": 2}, "rows": [other, new]}
    told = (tmp_path / "draft.md").read_text()
    assert told.count("| 2026-11-28 | A processor |") == 2
    before = (tmp_path / "draft.json").read_bytes()
    assert rows.main([str(tmp_path / "draft.json")]) == 0
    assert (tmp_path / "draft.json").read_bytes() == before
    assert (tmp_path / "draft.md").read_text() == told
