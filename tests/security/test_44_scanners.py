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
OUTSIDE = frozenset({"weft.native.build_hook", "weft.conform.pairs", "weft.convert.judge"})
"""Used by the build and by the tools."""


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
    """Some other one imports it, or it is found by its folder (techniques, families), or named as a program, or imported by a
    name that is put together; what nothing reaches is dead.
    """
    found = {module.name: module for module in modules()}
    used = set(ENTRANCES)
    for module in found.values():
        for i in imports(module):
            name = i.name
            while name:
                if name in found and name != module.name:
                    used.add(name)
                name = name.rpartition(".")[0]
    text = {name: (ROOT / name.replace(".", "/")).with_suffix(".py") for name in found}
    words = "\n".join(path.read_text() for path in text.values() if path.exists())
    dead = []
    for name, module in found.items():
        last = name.rpartition(".")[2]
        named = f"{last}.py" in words or f'"{last}"' in words or f"import {last}" in words or name in words
        by_folder = module.part in TECHNIQUES or name.startswith("weft.models.families.")
        if name not in used and not (module.package or named or by_folder or name in OUTSIDE):
            dead.append(name)
    assert dead == []
