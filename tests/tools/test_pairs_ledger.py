"""The program that goes on with the ledger of pairs: what is open, in which order, and what a test leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import pairs as program
from weft.conform import pairs
from weft.conform.pairs import Pair
from weft.errors import EngineError

ONE, OTHER = Pair(("draft", "ngram"), ("accept", "rejection")), Pair(("schedule", "fair"), ("draft", "ngram"))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "pairs", lambda: [OTHER, ONE])


def test_what_is_open() -> None:
    assert program.open_pairs({}) == [ONE, OTHER], "schedules come last"
    assert program.open_pairs({}, ["schedule"]) == [OTHER]
    assert program.open_pairs({}, ["accept=rejection"]) == [ONE]
    assert program.open_pairs({}, ["rejection"]) == []
    held = {"digest": pairs.digest(ONE)}
    assert program.open_pairs({str(ONE): held}) == [OTHER]
    assert program.open_pairs({str(ONE): {"digest": "of before"}}) == [OTHER, ONE], "what was never tested comes first"


def test_a_run_keeps_what_it_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "kept" / "pairs.json"

    def check(lab: object, pair: Pair, draws: int) -> str:
        if pair != ONE:
            raise EngineError("a bug")
        return f"{draws} draws"

    monkeypatch.setattr(pairs, "check", check)
    assert program.main(["--ledger", str(ledger), "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(ONE), str(OTHER)]
    assert program.main(["--ledger", str(ledger), "--draws", "7"]) == 1
    kept = json.loads(ledger.read_text())["pairs"]
    assert kept[str(ONE)]["ok"]
    assert kept[str(ONE)]["text"] == "7 draws"
    assert kept[str(OTHER)] | {"seconds": 0} == {
        "ok": False,
        "digest": "",
        "text": "EngineError: a bug",
        "seconds": 0,
    }
    assert "failed: schedule=fair + draft=ngram" in capsys.readouterr().out
    assert program.open_pairs(kept) == [OTHER], "what fails stays open"
    assert program.main(["--ledger", str(ledger), "--minutes", "-1"]) == 0
    assert json.loads(ledger.read_text())["pairs"] == kept
