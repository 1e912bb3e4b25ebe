"""The package itself: pins, the bundled model, a light import, the set-up program, the summary of checks, the skip rule."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import textwrap
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import weft
from tools import checks, install

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
DIRECT = {Requirement(r).name: Requirement(r) for r in [*PROJECT["dependencies"], *EXTRAS]}


def pins() -> dict[str, str]:
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


# ---------------------------------------------------------------------------------------------- pins and package


def test_every_direct_dependency_is_pinned_and_nothing_else() -> None:
    assert pins().keys() == DIRECT.keys()


def test_pins_lie_in_the_accepted_ranges() -> None:
    assert pins()["torch"] == "2.13.0"
    assert DIRECT["torch"].specifier.contains("2.9.0")
    assert [name for name, version in pins().items() if not DIRECT[name].specifier.contains(version)] == []


def test_version_stands_in_one_voice() -> None:
    assert weft.__version__ == PROJECT["version"]
    assert re.search(rf"^## {re.escape(weft.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_no_file_names_a_host_to_install_from() -> None:
    text = "".join(
        (ROOT / name).read_text()
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "tools/install.py", ".ci/run")
    )
    assert re.findall(r"https?://(?!\$\(HOST\))\S+", text) == []


def test_documents_link_only_to_files_that_exist() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert len(documents) > 8
    broken = []
    for document in documents:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text()):
            if "://" not in target and not (document.parent / target).exists():
                broken.append(f"{document.name}: {target}")
    assert broken == []


def test_the_documents_example_of_a_technique_works(tmp_path: Path) -> None:
    """The file in docs/adding-a-technique.md, with its imports, registers itself and ranks blocks by hits."""
    text = (ROOT / "docs" / "adding-a-technique.md").read_text()
    blocks = re.findall(r"(?:^    .*\n|^\n)+", text, re.MULTILINE)
    example = next(textwrap.dedent(block) for block in blocks if "@register" in block)
    imports = (
        "from dataclasses import dataclass, field\nfrom typing import ClassVar\n"
        "from weft.registry import parse, register\nfrom weft.traits import Traits\n"
    )
    use = (
        "lfu = parse('kv.evict=lfu').build()\n"
        "for block, event in ((1, 'publish'), (2, 'publish'), (1, 'hit'), (1, 'hit'), (2, 'hit')):\n"
        "    lfu.observe(block, event, 0.0)\n"
        "print(lfu.rank(1, 0.0), lfu.rank(2, 0.0))\n"
    )
    (tmp_path / "lfu.py").write_text(imports + example + use)
    done = subprocess.run([sys.executable, str(tmp_path / "lfu.py")], capture_output=True, text=True, env=path_of(ROOT))
    assert (done.stdout, done.stderr) == ("2.0 1.0\n", "")


def path_of(folder: Path) -> dict[str, str]:
    """An environment in which `import weft` finds this checkout."""
    return {**os.environ, "PYTHONPATH": str(folder)}


# ---------------------------------------------------------------------------------------------- the bundled model


def test_bundled_model_is_whole(bundled: Path) -> None:
    """The weights file holds exactly the tensors that its config describes: 7,344,384 parameters in bf16."""
    config = json.loads((bundled / "config.json").read_text())
    data = (bundled / "model.safetensors").read_bytes()
    (header_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + header_bytes])
    tensors = {name: t for name, t in header.items() if name != "__metadata__"}
    assert {t["dtype"] for t in tensors.values()} == {"BF16"}
    ends = sorted(tuple(t["data_offsets"]) for t in tensors.values())
    assert ends[0][0] == 0
    assert all(a[1] == b[0] for a, b in pairwise(ends))
    assert ends[-1][1] == len(data) - 8 - header_bytes == 2 * 7_344_384
    assert tensors["model.embed_tokens.weight"]["shape"] == [config["vocab_size"], config["hidden_size"]] == [4096, 256]
    tokens = json.loads((bundled / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(tokens) == config["vocab_size"]
    assert "add_generation_prompt" in (bundled / "chat_template.jinja").read_text()
    assert (bundled / "README.md").exists()


def test_bundled_model_is_the_trained_one(bundled: Path, shared: Callable[[str], Path]) -> None:
    original = shared("models/tiny")
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
    ):
        assert (bundled / name).read_bytes() == (original / name).read_bytes(), name


# ---------------------------------------------------------------------------------------------- import weft


def test_exports_are_there_and_unknown_ones_are_not() -> None:
    for name in weft.__all__:
        assert getattr(weft, name) is not None
    assert set(weft.__all__) <= set(dir(weft))
    with pytest.raises(AttributeError, match="NoSuchThing"):
        _ = weft.NoSuchThing


def test_import_loads_no_torch() -> None:
    heavy = ("torch", "numpy", "transformers", "tokenizers")
    code = f"import sys, weft; weft.SamplingParams(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.serial
def test_import_takes_at_most_300_ms() -> None:
    code = "import time; t = time.perf_counter(); import weft; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    assert statistics.median(times) <= 0.3, times


# ---------------------------------------------------------------------------------------------- the set-up program


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the set-up reads, with a folder that looks like a finished venv."""
    for name in ("pyproject.toml", "constraints.txt", "Makefile", "tools/install.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    return tmp_path


def stamp(tree: Path, *, extras: list[str], torch: str = "auto") -> None:
    content = {"fingerprint": install.fingerprint(tree), "extras": extras, "torch": torch}
    (tree / ".venv" / "weft-installed.json").write_text(json.dumps(content))


def current(tree: Path, extras: list[str], torch: str = "auto") -> bool:
    path = tree / ".venv" / "weft-installed.json"
    return install.is_current(path, install.fingerprint(tree), extras, torch)


@pytest.mark.serial
def test_second_set_up_costs_nothing(tree: Path) -> None:
    stamp(tree, extras=["test"])
    started = time.monotonic()
    done = subprocess.run(
        ["make", "-s", "install", "install-test", f"PYTHON={sys.executable}"], cwd=tree, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - started < 3


def test_stamp_covers_the_extras_asked_for(tree: Path) -> None:
    assert not current(tree, [])
    stamp(tree, extras=[])
    assert current(tree, [])
    assert not current(tree, ["test"])
    stamp(tree, extras=["hf", "test"])
    assert current(tree, ["test"])
    assert current(tree, [])


def test_stamp_covers_the_kind_of_torch(tree: Path) -> None:
    stamp(tree, extras=[], torch="cpu")
    assert current(tree, [], "auto")
    assert current(tree, [], "cpu")
    assert not current(tree, [], "cuda")


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "tools/install.py"])
def test_changed_requirements_end_the_stamp(tree: Path, name: str) -> None:
    stamp(tree, extras=[])
    (tree / name).write_text((tree / name).read_text() + "\n# changed\n")
    assert not current(tree, [])


def test_broken_stamp_or_venv_is_made_anew(tree: Path) -> None:
    stamp(tree, extras=[])
    assert current(tree, [])
    (tree / ".venv" / "weft-installed.json").write_text("{broken")
    assert not current(tree, [])
    (tree / ".venv" / "weft-installed.json").write_text("[1]")
    assert not current(tree, [])
    stamp(tree, extras=[])
    (tree / ".venv" / "bin" / "python").unlink()
    assert not current(tree, [])


def test_gpu_is_asked_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for script, answer in (("echo 'GPU 0: H200'", True), ("echo 'No devices'; exit 6", False), ("exit 0", False)):
        smi.write_text(f"#!/bin/sh\n{script}\n")
        smi.chmod(0o755)
        assert install.gpu_answers() is answer


def test_cpu_torch_refuses_a_cuda_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip, offered only a torch that needs CUDA packages, installs nothing and says which settings would help."""
    version = pins()["torch"]
    for name, needs in ((f"torch-{version}", "Requires-Dist: triton==3.0\n"), ("triton-3.0", "")):
        make_wheel(tmp_path, name, needs)
    target = tmp_path / "site"
    offline = ["--no-index", "--find-links", str(tmp_path), "--target", str(target)]
    monkeypatch.setattr(install, "venv_python", lambda *_: Path(sys.executable))
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(install.SetupFailed, match="TORCH_INDEX=URL"):
        install.install_torch("cpu", "", offline)
    assert not (target / "torch.py").exists()
    install.install_torch("cuda", "", offline)
    assert (target / "torch.py").exists()
    assert (target / "triton.py").exists()


def test_cpu_torch_is_taken_where_it_is_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(tmp_path, f"torch-{pins()['torch']}+cpu", "")
    make_wheel(tmp_path, f"torch-{pins()['torch']}", "Requires-Dist: triton==3.0\n")
    target = tmp_path / "site"
    monkeypatch.setattr(install, "venv_python", lambda *_: Path(sys.executable))
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    install.install_torch("cpu", "", ["--no-index", "--find-links", str(tmp_path), "--target", str(target)])
    assert (target / f"torch-{pins()['torch']}+cpu.dist-info").exists()


def make_wheel(folder: Path, name: str, needs: str) -> None:
    """A wheel of one module, built by hand."""
    import zipfile

    project, version = name.split("-")
    info = f"{name}.dist-info"
    files = {
        f"{project}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{f},,\n" for f in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


def test_make_lists_its_targets() -> None:
    done = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("serve", "test", "test-long", "format", "clean"):
        assert re.search(rf"^  make {target} +\S", done.stdout, re.MULTILINE), target


def test_make_without_a_python_says_so() -> None:
    done = subprocess.run(["make", "-s", "install", "PYTHON="], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "3.11" in done.stderr


# ---------------------------------------------------------------------------------------------- checks and skips

SKIPPING = """
import pytest

def test_passes(): pass
def test_skips(): pytest.skip("shared data is absent: data/x")
@pytest.mark.skip(reason="needs a GPU")
def test_gpu(): pass
@pytest.mark.xfail(reason="shared fault")
def test_expected(): assert False
"""


def small_run(folder: Path, name: str) -> checks.Outcome:
    """A real pytest run over a folder of its own, with the project's conftest, read as `make test` reads it."""
    (folder / "repo" / "tests").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "repo" / "tests")
    (folder / "repo" / "tests" / "test_small.py").write_text(SKIPPING)
    (folder / "repo" / "pytest.ini").write_text("[pytest]\n")
    place = [f"--rootdir={folder / 'repo'}", "-c", str(folder / "repo" / "pytest.ini"), str(folder / "repo" / "tests")]
    return checks.run(name, [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *place])


def test_skips_are_counted_by_reason(tmp_path: Path) -> None:
    outcome = small_run(tmp_path, "tests")
    assert (outcome.ok, outcome.tests) == (True, 4)
    assert outcome.skips == {"shared data is absent: data/x": 1, "needs a GPU": 1}
    text = checks.table([outcome, checks.Outcome("style", False, 1.0)])
    assert re.search(r"^tests +ok +\S+ +4 +2$", text, re.MULTILINE)
    assert re.search(r"^style +FAILED", text, re.MULTILINE)
    assert re.search(r"^1 +needs a GPU$", text, re.MULTILINE)


def test_nothing_may_skip_for_want_of_shared_data_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    outcome = small_run(tmp_path, "tests")
    assert not outcome.ok
    assert outcome.skips == {"needs a GPU": 1}


def test_tests_run_with_bytecode_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert small_run(tmp_path, "tests").ok
    assert list((tmp_path / "repo" / "tests" / "__pycache__").glob("test_small*.pyc"))


def test_each_step_of_the_long_tests_is_kept_as_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one by one, in any order, and stopped in the middle; one that is run again takes its own place."""
    monkeypatch.setattr(checks, "LONG_RESULT", tmp_path / "results" / "long.json")
    small = small_run(tmp_path, "hours")
    monkeypatch.setattr(checks, "run", lambda name, command: replace(small, name=name))
    assert checks.main(["--long", "--only", "hours"]) == 0
    found = json.loads(checks.LONG_RESULT.read_text())
    assert list(found) == ["hours"]
    assert found["hours"]["skips"] == small.skips
    assert (found["hours"]["tests"], found["hours"]["torch"]) == (4, metadata.version("torch"))

    def stopped(name: str, command: Sequence[str]) -> checks.Outcome:
        if name != "long":
            raise KeyboardInterrupt
        return replace(small, name=name, ok=False)

    monkeypatch.setattr(checks, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        checks.main(["--long"])
    found = json.loads(checks.LONG_RESULT.read_text())
    assert [(name, kept["passed"]) for name, kept in found.items()] == [("long", False), ("hours", True)]
    monkeypatch.setattr(checks, "run", lambda name, command: replace(small, name=name))
    assert checks.main(["--long"]) == 0
    found = json.loads(checks.LONG_RESULT.read_text())
    assert [(name, kept["passed"]) for name, kept in found.items()] == [(name, True) for name in checks.LONG]


@pytest.mark.parametrize("wrong", [["--only", "long"], ["--long", "--only", "tests"], ["--only", "quick"]])
def test_a_step_that_is_not_there_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        checks.main(wrong)
    assert f"no step {wrong[-1]}; there are " in capsys.readouterr().err


def test_steps_are_disjoint_and_cover_the_marks() -> None:
    steps = checks.commands(2)
    marks = {name: command[command.index("-m", 3) + 1] for name, command in steps.items() if "pytest" in command}
    assert marks == {
        "tests": "not long and not serial", "serial": "serial and not long",
        "long": "long and not hours and not serial", "hours": "long and hours", "long-serial": "long and serial",
    }  # fmt: skip
