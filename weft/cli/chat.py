"""x."""
from __future__ import annotations
def chat() -> None:
    """x."""
