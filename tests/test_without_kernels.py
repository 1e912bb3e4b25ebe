"""Where no compiler is at hand the package installs and runs on plain PyTorch and says so once; and `make test` fails there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
import zipfile
from pathlib import Path

import pytest

from tests.cli.running import Serving, weft
from tools import install
from weft import LLM, SamplingParams, native

ROOT = Path(__file__).resolve().parents[1]
HOW = ("--threads", "1", "--memory", "600M", "--max-model-len", "128")
HIDDEN = 'import sys\nsys.modules["weft.native._native"] = None\n'
NOTE = "this model runs on plain PyTorch, which is slower: weft's kernels were not built"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What is in the repository of the package, without an extension, and with no C++ compiler to find."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "weft", folder / "weft", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


WHEEL = "from hatchling.build import build_wheel; build_wheel('out')"
EDITABLE = """
from hatchling.builders.wheel import WheelBuilder
builder = WheelBuilder(".")
builder.get_build_hooks(".")["custom"].initialize("editable", builder.get_default_build_data())
"""
"""What an editable install does with the hook, without the package that it needs for the rest."""


def build(tree: Path, code: str, **more: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("hatchling")
    (tree / "out").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, timeout=240, env={**os.environ, **more}
    )
    assert done.returncode == 0, done.stderr
    return done


def compilerless(folder: Path) -> dict[str, str]:
    """An environment with CMake and Ninja, and no compiler."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("cmake", "ninja"):
        if (found := shutil.which(name)) is not None:
            (tools / name).symlink_to(found)
    return {"PATH": str(tools), "CXX": str(folder / "no-such-compiler"), "CC": str(folder / "no-such-compiler")}


def test_a_wheel_is_built_and_runs(tree: Path, tmp_path: Path) -> None:
    """As `pip install` builds it; then `weft generate` and `weft doctor` out of it."""
    done = build(tree, WHEEL, **compilerless(tmp_path))
    assert done.stderr.count("weft's kernels were not built") == 1
    (wheel,) = (tree / "out").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as packed:
        assert not [name for name in packed.namelist() if "_native" in Path(name).name]
        packed.extractall(site)
    env = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "weft", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=env)

    said = run("generate", "The sea was", "--max-tokens", "8", "--temperature", "0", *HOW)
    assert said.returncode == 0, said.stderr
    assert said.stderr.count(NOTE) == said.stderr.count("PyTorch") == 1, said.stderr
    with LLM(threads=1, memory="600M", max_model_len=128) as llm:  # on the kernels of this checkout
        wanted = llm.generate(["The sea was"], SamplingParams(max_tokens=8, temperature=0))[0].outputs[0].text
    assert said.stdout == wanted + "\n"
    found = json.loads(run("doctor", "--json").stdout)
    assert (found["ops"], found["isas"]) == ("ref", [])
    assert "were not built" in found["reason"]
    refused = run("generate", "The sea was", "--ops", "cpu", *HOW)
    assert refused.returncode == 2
    assert "kernels were not built" in refused.stderr


def test_a_build_that_fails_leaves_no_kernels_of_an_earlier_one(tree: Path, tmp_path: Path) -> None:
    """They would be of other sources, and `make test` would pass with them."""
    old = tree / "weft" / "native" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    old.write_bytes(b"an earlier build")
    build(tree, EDITABLE, **compilerless(tmp_path))
    assert not old.exists()


def test_the_checks_fail_without_kernels() -> None:
    """What `make test` runs is red where the build fell back."""
    code = HIDDEN + "import pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    words = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/native/test_kernels.py", "-k", "were_built"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout
    assert "1 failed" in done.stdout


@pytest.fixture
def hidden(tmp_path: Path) -> dict[str, str]:
    """An environment in which every process of weft finds no kernels."""
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    return {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


def test_a_server_says_it_once(tmp_path: Path, hidden: dict[str, str]) -> None:
    with Serving(tmp_path, "--port", "0", *HOW, **hidden) as serving:
        body = {"prompt": "The sea was", "max_tokens": 4}
        request = urllib.request.Request(
            f"{serving.url()}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["choices"][0]["text"]
        assert serving.err.read_text().count(NOTE) == 1


def test_who_asked_for_it_is_not_told(hidden: dict[str, str]) -> None:
    done = weft("generate", "The sea was", "--max-tokens", "2", "--ops", "ref", *HOW, **hidden)
    assert done.returncode == 0, done.stderr
    assert "PyTorch" not in done.stderr


def test_a_program_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_reason", "weft's kernels were not built (no compiler)")
    with LLM(threads=1, memory="600M", max_model_len=128):
        pass
    assert [record.getMessage() for record in caplog.records if record.name == "weft.llm"] == [
        f"note: {NOTE} (no compiler)"
    ]


def test_a_compiler_that_came_later_ends_the_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that `make serve` builds the kernels then, and does not say for ever that all is installed."""
    empty = tmp_path / "bin"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.delenv("CXX", raising=False)
    assert not install.has_compiler()
    before = install.fingerprint(ROOT)
    (empty / "g++").write_text("#!/bin/sh\n")
    (empty / "g++").chmod(0o755)
    assert install.has_compiler()
    assert install.fingerprint(ROOT) != before
