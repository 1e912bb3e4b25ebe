"""OpenVINO's driver without OpenVINO: what the exporter is asked for, when it runs anew, how tensors are counted."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bench.rivals.protocol import Kept, Loaded


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with empty ones in the place of the engine's, which are in its own environment alone."""
    for name in ("openvino", "openvino_genai"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.delitem(sys.modules, "bench.rivals.openvino_driver", raising=False)
    found = importlib.import_module("bench.rivals.openvino_driver")
    yield found
    sys.modules.pop("bench.rivals.openvino_driver", None)


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands of exports, each of which writes one file into its folder."""
    found: list[list[str]] = []

    def pretend(argv: list[str], **_: Any) -> None:
        found.append(argv)
        Path(argv[-1]).mkdir(parents=True)
        (Path(argv[-1]) / "openvino_model.xml").write_text(str(len(found)), encoding="utf8")

    monkeypatch.setattr(subprocess, "run", pretend)
    return found


def test_four_bits_are_asked_for_in_the_head_too(driver: Any, exports: list[list[str]], tmp_path: Path) -> None:
    for format in ("bf16", "int8", "int4"):
        driver.OpenVino().prepare(tmp_path / "model", format, tmp_path)
    assert ["--all-layers" in argv for argv in exports] == [False, False, True]
    assert "head too" in driver.KINDS["int4"]


def test_an_export_is_kept_until_its_options_change(
    driver: Any, exports: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "int4"
    folder.mkdir()
    (folder / "exported").touch()  # as it was left before options were written into it
    (folder / "old.bin").touch()
    driver.OpenVino().prepare(tmp_path / "model", "int4", tmp_path)
    assert (len(exports), (folder / "old.bin").exists()) == (1, False)
    driver.OpenVino().prepare(tmp_path / "model", "int4", tmp_path)
    assert len(exports) == 1
    monkeypatch.setitem(driver.EXPORTS, "int4", [*driver.EXPORTS["int4"], "--awq"])
    driver.OpenVino().prepare(tmp_path / "model", "int4", tmp_path)
    assert (len(exports), (folder / "openvino_model.xml").read_text(encoding="utf8")) == (2, "2")


def constant(name: str, type: str, *shape: int) -> Any:
    data = SimpleNamespace(ctypes=SimpleNamespace(data=hash(name)))
    element = SimpleNamespace(get_type_name=lambda: type)
    return SimpleNamespace(
        get_type_name=lambda: "Constant", get_friendly_name=lambda: name, get_output_shape=lambda at: list(shape),
        get_element_type=lambda: element, data=data,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("head", "bytes"),
    [
        ([("", "u8", (256, 64)), ("/zero_point", "u8", (256, 1)), ("/scale", "f16", (256, 1))], 256 * (64 + 1 + 2)),
        ([("", "i4", (256, 2, 32)), ("/scale", "f16", (256, 2, 1))], 256 * (32 + 4)),
    ],
    ids=["8 bits", "4 bits"],
)
def test_bytes_of_a_tied_head_are_those_of_its_tensors(
    driver: Any, head: list[tuple[str, str, tuple[int, ...]]], bytes: int
) -> None:
    """Names and shapes as nncf writes them, without --all-layers and with it."""
    embedding, body = "self.model.embed_tokens.weight", "self.model.layers.0.proj.weight"
    ops = [constant(embedding + end, type, *shape) for end, type, shape in head]
    ops += [constant(body, "i4", 64, 2, 32), constant(f"{body}/scale", "f16", 64, 2, 1)]
    found = Loaded("1", "int4", 0.0)
    driver.keep(SimpleNamespace(get_ordered_ops=lambda: ops), found)
    assert (found.head, found.body) == (Kept(256 * 64, bytes), Kept(64 * 64, 64 * (32 + 4)))
