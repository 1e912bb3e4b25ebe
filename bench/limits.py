"""Figures that are held to limits."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def judged(name: str, found: Mapping[str, Any], limits: Mapping[str, tuple[str, float]]) -> dict[str, Any]:
    """The same figures with their limits, `at most` or `at least`, and whether they keep them, which is said on stderr too."""
    met = {key: found[key] <= most if how == "at most" else found[key] >= most for key, (how, most) in limits.items()}
    for key, (how, most) in limits.items():
        missed = "" if met[key] else ": MISSED"
        print(f"{name}: {key} is {found[key]:.4g}, {how} {most:g} is wanted{missed}", file=sys.stderr, flush=True)
    return {
        **found,
        "limits": {key: f"{how} {most:g}" for key, (how, most) in limits.items()},
        "met": all(met.values()),
    }
