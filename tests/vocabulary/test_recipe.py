"""Recipes: a stack as TOML, and every way to write one wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.config import build_stack
from weft.errors import ConfigError
from weft.recipe import MAX_BYTES, merged, parts, read
from weft.registry import parse

ROOT = Path(__file__).resolve().parents[2]
TEXT = '[stack]\nschedule = "layered(groups=2)"\nkv.evict = "lru"\n"kv.store" = "int8"\n'


def test_slots_with_dots_are_written_either_way() -> None:
    assert [str(p) for p in parts(TEXT)] == ["schedule=layered(groups=2)", "kv.evict=lru", "kv.store=int8"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "[stack]"),
        ("[stack]\n", "[stack]"),
        ("[stack", "no TOML"),
        ("stack = 3", "[stack]"),
        ('[stack]\ndraft = "ngram"\n[other]\na = 1', "'other'"),
        ('plugins = ["x.py"]\n[stack]\ndraft = "ngram"', "'plugins'"),
        ("[stack]\ndraft = 3", "draft"),
        ('[stack]\ndraft = ["ngram"]', "draft"),
        ('[stack]\nkv.draft = "ngram"', "kv.draft"),
        ('[stack]\ndraf = "ngram"', "draft"),
        ('[stack]\ndraft.ngram = "x"', "draft"),
        ("[stack]\ndraft = \"__import__('os')\"", "argument"),
        ('[stack]\ndraft = "ngram"\ndraft = "ngram"', "no TOML"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parts(text)
    assert said in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    large = tmp_path / "large.toml"
    large.write_text("#" * (MAX_BYTES + 1))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('[stack]\ndraft = "ngrm"')
    for file in (large, binary, tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="recipe"):
            read(file)
    assert [str(p) for p in read(wrong)] == ["draft=ngrm"]  # whether there is one is asked when it is built
    with pytest.raises(ConfigError, match="ngram"):
        build_stack(read(wrong))


def test_what_is_given_beside_a_recipe_goes_before_it() -> None:
    recipe = parts(TEXT)
    both = merged(recipe, [parse("schedule=fcfs"), parse("draft=ngram")])
    assert [str(p) for p in both] == ["kv.evict=lru", "kv.store=int8", "schedule=fcfs", "draft=ngram"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_the_recipes_that_come_with_weft_compose(path: Path) -> None:
    assert build_stack(read(path)).verdict.verdict != "refused"
