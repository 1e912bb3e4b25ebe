"""Techniques from files outside the package, and from installed packages."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from pathlib import Path

import pytest

from weft import registry
from weft.errors import ConfigError
from weft.registry import build, load_plugin, lookup, names, parse

FILE = '''"""LFU: a policy.

Paper    none
Rule     none
Units    none
Cost     none
Differs  nothing
Raises   nothing
"""
from dataclasses import dataclass
from typing import ClassVar

from weft.registry import register
from weft.traits import Traits


@register("kv.evict", "{name}")
@dataclass(slots=True)
class LFU:
    weight: float = 1.0
    traits: ClassVar[Traits] = Traits()

    def observe(self, block, event, now): ...
    def rank(self, block, now): return self.weight
'''


@pytest.fixture
def written(tmp_path: Path, clean_registry: None) -> Path:
    path = tmp_path / "lfu.py"
    path.write_text(FILE.replace("{name}", "lfu"))
    return path


def test_a_file_brings_its_techniques(written: Path) -> None:
    assert load_plugin(written) == [("kv.evict", "lfu")]
    assert "lfu" in names("kv.evict")
    assert build(parse("kv.evict=lfu(weight=2)")).weight == 2.0
    assert load_plugin(str(written)) == [("kv.evict", "lfu")]  # a second time changes nothing
    assert lookup("kv.evict", "lfu").__name__ == "LFU"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "registers no technique"),
        ("1/0", "ZeroDivisionError"),
        ("def f(:", "SyntaxError"),
        ("import no_such_module_anywhere", "no_such_module_anywhere"),
        (FILE.replace("{name}", "lru"), "twice"),
        (FILE.replace("kv.evict", "kv.evikt").replace("{name}", "a"), "kv.evict"),
    ],
    ids=["nothing", "fails", "no Python", "imports", "taken", "no slot"],
)
def test_a_file_that_will_not_do_leaves_nothing_behind(
    tmp_path: Path, clean_registry: None, text: str, said: str
) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(text)
    before = {slot: names(slot) for slot in registry.SLOTS}
    with pytest.raises(ConfigError, match=said):
        load_plugin(path)
    assert {slot: names(slot) for slot in registry.SLOTS} == before
    assert not [m for m in sys.modules if m.endswith("_wrong")]


@pytest.mark.parametrize("name", ["none.py", "folder", "lfu.txt"])
def test_what_is_no_python_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "lfu.txt").write_text(FILE)
    with pytest.raises(ConfigError, match="no such Python file"):
        load_plugin(tmp_path / name)


def test_an_installed_package_names_its_techniques(monkeypatch: pytest.MonkeyPatch, clean_registry: None) -> None:
    """Entry points of the group; the module is imported when the technique is used, and not before."""
    module = types.ModuleType("their_lfu")
    points = [importlib.metadata.EntryPoint("kv.evict:theirs", "their_lfu", registry.ENTRY_POINTS)]
    points.append(importlib.metadata.EntryPoint("no.slot:x", "nowhere", registry.ENTRY_POINTS))
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: points if group == registry.ENTRY_POINTS else []
    )
    registry._installed.cache_clear()
    try:
        assert "theirs" in names("kv.evict")
        assert "their_lfu" not in sys.modules
        monkeypatch.setitem(sys.modules, "their_lfu", module)
        exec(compile(FILE.replace("{name}", "theirs"), "their_lfu", "exec"), vars(module))
        assert build(parse("kv.evict=theirs")).weight == 1.0
    finally:
        registry._installed.cache_clear()
