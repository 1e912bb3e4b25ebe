"""The matrix page is what its generator writes, and few pairs are refused."""

from __future__ import annotations

import itertools

import pytest

from tools import matrix
from weft.compose import compose
from weft.conform import pairs
from weft.conform.lab import Lab
from weft.registry import parse, register
from weft.traits import Trait, Traits

MOST_REFUSED = 0.15


def test_the_page_is_what_the_generator_writes() -> None:
    assert matrix.main(["--check"]) == 0, "run python -m tools.matrix"


def test_few_pairs_are_refused_and_each_says_what_would_help() -> None:
    """Every refusal names the word that is missing and who gives it."""
    found = matrix.shown()
    said = [v for a, b in itertools.combinations(found, 2) if (v := matrix.verdict(a, b)) is not None]
    refused = [v for v in said if v.verdict == "refused"]
    assert len(refused) <= MOST_REFUSED * len(said)
    for v in refused:
        assert v.reasons
        assert all("gives it" in r.text for r in v.reasons if r.rule == "needs")


def test_a_cell_says_what_compose_says() -> None:
    found = matrix.shown()
    names = [f"{f.slot}={f.name}" for f in found]
    one, other = names.index("draft=ngram"), names.index("schedule=layered")
    row = matrix.rows(found)[2 + max(one, other)].split(" | ")
    cell = row[3 + min(one, other)].strip(" |")
    assert cell == matrix.MARKS[compose([parse("draft=ngram"), parse("schedule=layered")]).verdict]


def test_a_page_that_was_edited_is_noticed(monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    page = tmp_path / "matrix.md"
    page.write_text(matrix.page(matrix.shown()).replace("| + |", "| x |", 1))
    monkeypatch.setattr(matrix, "PAGE", page)
    assert matrix.main(["--check"]) == 1


def test_an_unknown_flag_is_refused_and_nothing_is_written(monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "matrix.md")
    with pytest.raises(SystemExit) as error:
        matrix.main(["--chek"])
    assert error.value.code == 2
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(matrix.sys, "argv", ["matrix", "--write"])
    with pytest.raises(SystemExit):
        matrix.main()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def refused(clean_registry: None) -> pairs.Pair:
    """Two techniques, of which one needs a word that nobody gives."""

    class Prophet:
        traits = Traits(needs=frozenset({Trait.FUTURE}))

    Prophet.__module__ = f"{__name__}.schedule.prophet"
    register("schedule", "prophet")(Prophet)
    return pairs.Pair(("schedule", "prophet"), ("draft", "ngram"))


def test_a_pair_that_is_refused_is_refused_when_it_is_built_and_with_the_same_reasons(refused: pairs.Pair) -> None:
    found = pairs.check(Lab(), refused)
    assert found.startswith("refused: schedule=prophet needs FUTURE; ")
    assert refused in pairs.pairs()


def test_a_pair_that_is_refused_and_built_all_the_same_is_noticed(
    refused: pairs.Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "build_stack", lambda parts: None)
    with pytest.raises(AssertionError, match="built all the same"):
        pairs.check(Lab(), refused)
