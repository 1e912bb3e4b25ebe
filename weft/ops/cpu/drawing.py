"""Draws of tokens by weft's kernels: by all threads of a program, or by the one that asks where that is sooner done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FEW_LOGITS = 1 << 16
"""A thread draws from so many in some 0.2 ms at most; to wake another one takes 0.1 ms, for each draw of a draft's guesses."""


class Drawing:
    """program: of several threads.  alone: of one."""

    def __init__(self, program: Any, alone: Any) -> None:
        self._program, self._alone = program, alone

    def draw(self, logits: Sequence[int], vocab: int, *laws: Sequence[float]) -> list[int]:
        """Of rows of logits at these addresses, by their temperatures, top_k, top_p, min_p and keys of noise."""
        program = self._alone if len(logits) * vocab <= FEW_LOGITS else self._program
        found: list[int] = program.draw(logits, vocab, *laws)
        return found
