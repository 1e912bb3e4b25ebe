"""`weft conformance`: the counts are those of the samples, and published ones are judged without a mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from weft.cli.app import app
from weft.conformance import schema
from weft.conformance.spell import spells
from weft.slots import GrammarPath

KEYS = ["suite", "total", "enforced", "refused", "wrong_accept", "wrong_reject"]


def call(*args: str) -> Any:
    return CliRunner().invoke(app, ["conformance", *args], prog_name="weft")


def write(folder: Path, *samples: tuple[Any, list[tuple[bool, Any]]]) -> Path:
    place = folder / "schema" / "jsonschemabench-maskbench"
    place.mkdir(parents=True)
    lines = [json.dumps({"schema": s, "tests": [{"valid": v, "data": d} for v, d in tests]}) for s, tests in samples]
    (place / "some.jsonl").write_text("\n".join(lines))
    return folder


def test_counts(tmp_path: Path) -> None:
    """One enforced, one refused, and one whose sample is wrongly called valid, so that turning it down counts as a mistake."""
    point = {
        "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    data = write(
        tmp_path,
        (
            {"type": "object", **point},
            [(True, {"y": 1.5, "x": 2.0}), (True, {"x": 3}), (False, {"y": 1}), (False, {"x": 1, "z": 2})],
        ),
        ({"type": "array", "uniqueItems": True}, [(True, [1]), (False, [1, 1])]),
        ({"type": "integer"}, [(True, "one")]),
    )
    result = call("schema", "--data", str(data), "--json")
    found = json.loads(result.stdout)
    assert list(found) == KEYS
    assert list(found.values()) == ["schema", 3, 1, 1, 0, 1]
    assert result.exit_code == 1
    assert "rejected, and is right: some.jsonl:3" in call("schema", "--data", str(data)).stdout


def test_wrong_places_and_names(tmp_path: Path) -> None:
    assert call("schema", "--data", str(tmp_path)).exit_code == 2
    assert call("nothing").exit_code == 2


def test_a_value_may_be_written_in_any_order() -> None:
    begin = schema.weft()
    inner = {
        "type": "object",
        "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}},
        "additionalProperties": False,
    }
    path = begin(
        {
            "type": "object",
            "properties": {"q": {"type": "array", "items": inner}, "p": inner},
            "additionalProperties": False,
        }
    )
    right = {"p": {"a": 1, "b": 2}, "q": [{"a": 1}, {"a": 3, "b": 4}, {}]}
    assert spells(path.fork(), right)
    assert spells(path.fork(), right, [["q", "p"], ["b", "a"]])
    assert not spells(path.fork(), {**right, "q": [{"a": 1, "c": 2}]})
    assert not spells(path.fork(), {**right, "p": {"a": 1.5}})


def sampled(shared: Callable[[str], Path], every: int) -> list[schema.Sample]:
    found = list(schema.samples(shared("data/schema")))
    return found[::every]


def alone() -> Callable[[Any], GrammarPath]:
    """The library as it comes: its own limits, formats and white space."""
    from llguidance import LLMatcher

    from weft.constrain.llguidance import BYTES, Path, _fail, _tokenizer
    from weft.types import Grammar

    tokenizer = _tokenizer(BYTES)

    def begin(one: Any) -> GrammarPath:
        matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(one)), log_level=0)
        _fail(matcher, Grammar("json", ""))
        return Path({"masks": 0, "tokens": 0}, Grammar("json", ""), matcher, frozenset(BYTES.ends), 257)

    return begin


def compared(samples: list[schema.Sample]) -> None:
    """No mistake, and at least as many schemas enforced as the library alone enforces."""
    mine, theirs = schema.judge(samples, schema.weft()), schema.judge(samples, alone())
    assert mine.ok, mine.wrong
    assert mine.enforced >= theirs.enforced > 0
    assert mine.total == mine.enforced + mine.refused == len(samples)


def test_published_schemas(shared: Callable[[str], Path]) -> None:
    compared(sampled(shared, 97))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_all_published_schemas(shared: Callable[[str], Path]) -> None:
    compared(sampled(shared, 1))
