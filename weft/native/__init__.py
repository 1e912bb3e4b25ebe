"""The compiled kernels for CPUs (`src/`), or the reason why they are not there.

They are built with the package (CMakeLists.txt).  Where no compiler was at hand the package works without
them, on `weft.ops.ref`.
"""

from __future__ import annotations

import importlib
from typing import Any

_native: Any = None
_reason = ""
try:
    _native = importlib.import_module("weft.native._native")
except ImportError as error:
    _reason = f"weft's kernels were not built ({error}); install weft again where a C++20 compiler is at hand"


def module() -> Any | None:
    """The extension module, or None where it was not built."""
    return _native


def why_not() -> str:
    """Why there is no module, in a sentence; empty where there is one."""
    return _reason
