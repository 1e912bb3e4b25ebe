"""Row 44: what a scanner flags by its mere presence is not there: no pickles, no archives, no engine code that nothing uses."""

from __future__ import annotations

import zipfile
from pathlib import Path

from tests.test_imports import TECHNIQUES, imports, modules

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = frozenset(
    ".pkl .pickle .pt .pth .bin .ckpt .joblib .npy .npz .h5 .onnx .msgpack .dill .so.old .jar .exe .dll".split()
)
PROTOCOLS = tuple(bytes([0x80, version]) for version in range(2, 6))
"""How a pickle begins."""
ENTRANCES = frozenset({"weft", "weft.__main__"})
LAYOUT = frozenset({"native", "starters", "bundled"})


def test_no_file_is_a_pickle() -> None:
    count = 0
    for path in (ROOT / "weft").rglob("*"):
        if not path.is_file() or "__pycache__" in path.parts:
            continue
        count += 1
        assert path.suffix not in SUFFIXES, path
        with open(path, "rb") as file:
            assert not file.read(2).startswith(PROTOCOLS), path
        assert not zipfile.is_zipfile(path), path
    assert count > 100


def test_every_module_is_used() -> None:
    """Some other one imports it, or it is a technique, or it is started as a program; what nothing reaches is dead."""
    found = {module.name: module for module in modules()}
    used = set(ENTRANCES)
    for module in found.values():
        for i in imports(module):
            name = i.name
            while name:
                if name in found and name != module.name:
                    used.add(name)
                name = name.rpartition(".")[0]
    started = {"weft.cli._engine", "weft.front.template_worker", "weft.front.grammar_worker", "weft.native.build_hook"}
    text = "\n".join(path.read_text() for path in (ROOT / "weft").rglob("*.py"))
    for name in started - {"weft.native.build_hook"}:
        assert name in text or f"{name.rpartition('.')[2]}.py" in text, "it is started by its name"
    dead = [
        name
        for name, module in found.items()
        if name not in used | started and module.part not in TECHNIQUES and not module.package
    ]
    assert dead == []
