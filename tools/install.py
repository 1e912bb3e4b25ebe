"""Make `.venv` and install weft into it: what `make serve` and `make test` do first.

    python3 tools/install.py [--extra test] [--torch auto|cpu|cuda] [--torch-index URL] [--pip-args "..."]

Needs Python 3.11 and nothing else.  When `.venv` already holds what `pyproject.toml` and `constraints.txt` ask for, it
returns at once.

PyTorch on a machine without a GPU.  On Linux the default build of torch depends on several gigabytes of CUDA packages,
and builds without them stand under the same version elsewhere.  So, when no GPU answers:

1. pip is asked for torch under constraints that no CUDA package can meet.  Where a CPU build is what the configured
   sources offer (macOS, many ARM machines, mirrors, a folder of wheels, `--torch-index`), it is installed; where only the
   CUDA build is, pip gives up after reading metadata and nothing large was fetched.
2. uv is asked with `--torch-backend=cpu`; it knows where PyTorch keeps its CPU builds.
3. Otherwise the set-up stops and says which two settings would help.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
NO_CUDA = ("triton", "cuda-toolkit", "cuda-bindings", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-nccl-cu13")
"""Requirements that every CUDA build of torch has at least one of, and no CPU build has."""
KERNEL_SOURCES = (".cpp", ".h", ".inl", ".txt", ".py")
OLDEST_PIP = (24, 0)
"""Older pips download whole wheels to read their requirements."""


class SetupFailed(Exception):
    """The set-up cannot go on; the text says what to change."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make .venv and install weft into it.")
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml, e.g. test")
    parser.add_argument("--torch", choices=("auto", "cpu", "cuda"), default="auto", help="which build of torch")
    parser.add_argument("--torch-index", default="", help="URL of a package index that has the wanted build of torch")
    parser.add_argument("--pip-args", default="", help="further arguments for every pip install")
    options = parser.parse_args(argv)
    stamp = VENV / "weft-installed.json"
    wanted = fingerprint(ROOT)
    extras = sorted(set(options.extra) | installed_extras(stamp, wanted))
    if is_current(stamp, wanted, options.extra, options.torch):
        return 0
    started = time.monotonic()
    try:
        stamp.unlink(missing_ok=True)
        make_venv()
        pip_args = shlex.split(options.pip_args)
        kind = options.torch if options.torch != "auto" else ("cuda" if gpu_answers() else "cpu")
        install_torch(kind, options.torch_index, pip_args)
        name = f".[{','.join(extras)}]" if extras else "."
        pip(f"weft and its libraries ({name})", ["-e", name, *pip_args], constrained=True)
    except SetupFailed as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    stamp.write_text(json.dumps({"fingerprint": wanted, "extras": extras, "torch": options.torch}))
    print(f"set-up: done in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def fingerprint(root: Path) -> str:
    """Changes when the set-up would give something else: pins, requirements, kernels, this file, the place, the Python.

    And once there is a compiler where there was none: the kernels can be built then.
    """
    digest = hashlib.sha256(f"{root} {platform.python_version()} {has_compiler()}".encode())
    kernels = sorted(path for path in (root / "weft" / "native").rglob("*") if path.suffix in KERNEL_SOURCES)
    for path in (*(root / name for name in ("pyproject.toml", "constraints.txt", "tools/install.py")), *kernels):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def has_compiler() -> bool:
    """Whether there is something that may compile C++ (CMake looks for more)."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++"))


def read_stamp(stamp: Path) -> dict[str, object]:
    try:
        found = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def installed_extras(stamp: Path, wanted: str) -> set[str]:
    """Extras that the venv has by the same pins, so that `make serve` after `make test` keeps the test tools."""
    found = read_stamp(stamp)
    extras = found.get("extras")
    return {str(e) for e in extras} if found.get("fingerprint") == wanted and isinstance(extras, list) else set()


def is_current(stamp: Path, wanted: str, extras: Sequence[str], torch: str) -> bool:
    found = read_stamp(stamp)
    return (
        found.get("fingerprint") == wanted
        and set(extras) <= installed_extras(stamp, wanted)
        and torch in ("auto", found.get("torch"))
        and venv_python(stamp.parent).exists()
    )


def venv_python(venv: Path = VENV) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 (this file also runs under what a user happens to have)
        raise SetupFailed(
            f"weft needs Python 3.11 or newer, this is {platform.python_version()}; set PYTHON=/path/to/it"
        )
    probe = [str(venv_python()), "-c", "import sys, pip; print(sys.version_info[:2], pip.__version__)"]
    alive = subprocess.run(probe, capture_output=True, text=True).stdout if venv_python().exists() else ""
    if not alive.startswith(str(sys.version_info[:2])):
        hint = "python cannot make virtual environments; on Debian and Ubuntu install the package python3-venv"
        run("a virtual environment in .venv", [sys.executable, "-m", "venv", "--clear", str(VENV)], hint)
        alive = subprocess.run(probe, capture_output=True, text=True).stdout
    version = tuple(int(part) for part in alive.split()[-1].split(".")[:2])
    if version < OLDEST_PIP:
        pip("a newer pip", ["--upgrade", "pip"])


def gpu_answers() -> bool:
    """Whether an NVIDIA driver lists a GPU."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    try:
        listed = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def torch_pin() -> str:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("torch=="):
            return line.strip()
    raise SetupFailed("constraints.txt has no line torch==...")


def install_torch(kind: str, index: str, pip_args: Sequence[str]) -> None:
    """Installs the pinned torch; without CUDA packages where kind is "cpu"."""
    pin = torch_pin()
    source = ["--index-url", index] if index else []
    if kind == "cuda":
        pip(f"{pin} with CUDA (some gigabytes)", [pin, *source, *pip_args])
        return
    with tempfile.TemporaryDirectory() as folder:
        refuse = Path(folder) / "no-cuda.txt"
        refuse.write_text("".join(f"{name}==0\n" for name in NO_CUDA))
        try:
            pip(f"{pin}, CPU build", [pin, "-c", str(refuse), *source, *pip_args])
            return
        except SetupFailed as error:
            reason = str(error)
    if index:
        raise SetupFailed(f"the index given holds no CPU build of {pin}\n{reason}")
    try:
        pip("uv, which knows where CPU builds of torch are", ["uv", *pip_args])
        backend = ["pip", "install", "--python", str(venv_python()), "--torch-backend=cpu", pin]
        run(f"{pin}, CPU build, with uv", [str(venv_python()), "-m", "uv", *backend])
    except SetupFailed as error:
        raise SetupFailed(
            f"no CPU build of {pin} was found, and the CUDA build (gigabytes) was not wanted.\n"
            "  Name a package index that has a CPU build:  make serve TORCH_INDEX=URL\n"
            f"  or take the CUDA build all the same:        make serve TORCH=cuda\n{error}"
        ) from None


def pip(what: str, arguments: Sequence[str], *, constrained: bool = False) -> None:
    pins = ["-c", str(ROOT / "constraints.txt")] if constrained else []
    quiet = ["--disable-pip-version-check", "--progress-bar=off", "--no-input"]
    run(what, [str(venv_python()), "-m", "pip", "install", *quiet, *pins, *arguments])


def run(what: str, command: Sequence[str], hint: str = "") -> None:
    """Runs a step: one line when it starts, a sign of life every 15 s, its last lines only when it fails."""
    print(f"set-up: {what}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            while True:
                try:
                    code = process.wait(timeout=15)
                    break
                except subprocess.TimeoutExpired:
                    print(f"set-up:   still at it, {time.monotonic() - started:.0f} s", flush=True)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if code != 0:
            log.seek(0)
            tail = "".join(f"    {line}" for line in log.readlines()[-12:])
            raise SetupFailed(f"{what}: {hint or 'the command failed'}\n    $ {shlex.join(command)}\n{tail}")


if __name__ == "__main__":
    sys.exit(main())
