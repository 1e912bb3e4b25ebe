"""The kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer built into the kernels.

    python -m tools.sanitize [TESTS ...]        (default: tests/native)

Builds the extension once more, with checks, in .cache/sanitized, and runs the tests in a process that loads that one.  A read or
a write outside of an object, or an overflow, ends the run with its place in the source.  Needs g++, cmake and ninja beside the
test tools.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / ".cache" / "sanitized"
NAME = "weft.native._native"
MARK = "WEFT_SANITIZED"


def find(library: str) -> str:
    """Where the compiler has it."""
    said = subprocess.run(["g++", f"-print-file-name={library}"], check=True, capture_output=True, text=True)
    return said.stdout.strip()


def main(tests: list[str]) -> int:
    if MARK in os.environ:
        return _run(os.environ[MARK], tests)
    if absent := [tool for tool in ("g++", "cmake", "ninja") if shutil.which(tool) is None]:
        print(
            f"make sanitize builds the kernels, and there is no {', '.join(absent)} here: install it", file=sys.stderr
        )
        return 1
    BUILD.mkdir(parents=True, exist_ok=True)
    for command in (
        ["cmake", "-S", str(ROOT / "weft" / "native"), "-B", str(BUILD), "-G", "Ninja", "-DWEFT_SANITIZE=ON",
         f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", str(BUILD)],
    ):  # fmt: skip
        subprocess.run(command, check=True)
    extension = next(BUILD.glob("_native*.so"))
    checks = {
        # It must come before everything else, since Python was not built with it; and it looks for what throws when it starts.
        "LD_PRELOAD": ":".join(find(name) for name in ("libasan.so", "libstdc++.so")),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # what Python keeps to its end is no leak
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        MARK: str(extension),
    }
    own = [sys.executable, "-m", "tools.sanitize", *tests]
    return subprocess.run(own, cwd=ROOT, env={**os.environ, **checks}, check=False).returncode


def _run(extension: str, tests: list[str]) -> int:
    spec = importlib.util.spec_from_file_location(NAME, extension)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    import pytest

    from weft import native

    assert native.module() is module
    return int(pytest.main(["-q", "-s", "-p", "no:xdist", "-p", "no:cacheprovider", *(tests or ["tests/native"])]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
