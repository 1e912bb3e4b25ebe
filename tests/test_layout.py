"""Sizes and names: files and functions stay short, every module says what it is for, words that name nothing are not used."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE_LINES = 420
TEST_FILE_LINES = 600
FUNCTION_LINES = 70
EMPTY_NAMES = re.compile(r"(Manager|Mixin|Utils?|Helper)$|^Base[A-Z]|Base$")
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b|raise NotImplemented" r"Error")


def sources() -> Iterator[tuple[str, str]]:
    for folder in ("weft", "tools", "bench", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf8")


@lru_cache(1)
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def long_file(name: str, source: str) -> list[str]:
    limit = TEST_FILE_LINES if name.startswith("tests/") else FILE_LINES
    lines = source.count("\n")
    return [f"{name}: {lines} lines, at most {limit}"] if lines > limit else []


def long_function(name: str, source: str) -> list[str]:
    complaints = []
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                complaints.append(f"{name}:{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES}")
    return complaints


def silent_module(name: str, source: str) -> list[str]:
    empty = name.endswith("__init__.py") and not source.strip()
    return [] if empty or ast.get_docstring(parsed(source)) else [f"{name}: the module has no docstring"]


def empty_name(name: str, source: str) -> list[str]:
    stem = Path(name).stem
    complaints = [f"{name}: a file named {stem}"] if stem in ("utils", "util", "helpers", "misc", "common") else []
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.ClassDef) and EMPTY_NAMES.search(node.name):
            complaints.append(f"{name}:{node.lineno}: class {node.name} says nothing")
    return complaints


def unfinished(name: str, source: str) -> list[str]:
    return [f"{name}:{n}: {line.strip()}" for n, line in enumerate(source.splitlines(), 1) if UNFINISHED.search(line)]


def idle_test(name: str, source: str) -> list[str]:
    """A test with neither assert, raise, with nor call cannot fail."""
    if not name.startswith("tests/"):
        return []
    return [
        f"{name}:{node.lineno}: {node.name} asserts nothing"
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test")
        and not any(isinstance(x, ast.Assert | ast.Raise | ast.With | ast.Call) for b in node.body for x in ast.walk(b))
    ]


RULES = (long_file, long_function, silent_module, empty_name, unfinished, idle_test)


@cache
def everywhere() -> dict[str, list[str]]:
    """Complaints of each rule over all sources, each of which is parsed once."""
    complaints: dict[str, list[str]] = {rule.__name__: [] for rule in RULES}
    count = 0
    for name, source in sources():
        count += 1
        for rule in RULES:
            complaints[rule.__name__] += rule(name, source)
    assert count > 10, "the sources were not found"
    return complaints


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_everywhere(rule) -> None:
    complaints = everywhere()[rule.__name__]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (long_file, "weft/a.py", "x = 1\n" * 421),
        (long_file, "tests/test_a.py", "x = 1\n" * 601),
        (long_function, "weft/a.py", "def f():\n" + "    x = 1\n" * 70),
        (long_function, "weft/a.py", "class A:\n  async def f(self):\n" + "    x = 1\n" * 70),
        (silent_module, "weft/a.py", "x = 1"),
        (empty_name, "weft/a.py", "class BlockManager: pass"),
        (empty_name, "weft/a.py", "class BaseCache: pass"),
        (empty_name, "weft/utils.py", "x = 1"),
        (unfinished, "weft/a.py", "x = 1  # TO" + "DO later"),
        (unfinished, "weft/a.py", "def f():\n    raise NotImplemented" + "Error"),
        (idle_test, "tests/test_a.py", "def test_a():\n    x = 1"),
    ],
)
def test_rule_bites(rule, name: str, source: str) -> None:
    assert rule(name, source)


def test_every_package_folder_is_a_package() -> None:
    """A folder with modules and no __init__.py would be left out of the types and the wheel's import checks."""
    folders = {path.parent for path in (ROOT / "weft").rglob("*.py")}
    assert [f.relative_to(ROOT).as_posix() for f in sorted(folders) if not (f / "__init__.py").exists()] == []
