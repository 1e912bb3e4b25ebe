"""Draws of tokens by weft's kernels: by all threads of a program, or by the one that asks where that is sooner done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LITTLE = 1 << 21
"""Work that one thread does in some 0.1 ms, which it takes to wake another one: the greatest of so many logits, or a race of a
tenth of them."""
RACE = 10


class Drawing:
    """program: of several threads.  alone: of one."""

    def __init__(self, program: Any, alone: Any) -> None:
        self._program, self._alone = program, alone

    def draw(self, logits: Sequence[int], vocab: int, *laws: Sequence[float]) -> list[int]:
        """Of rows of logits at these addresses, by their temperatures, top_k, top_p, min_p and keys of noise."""
        temperatures = laws[0]
        work = vocab * sum(RACE if t else 1 for t in temperatures)
        program = self._alone if work <= LITTLE else self._program
        found: list[int] = program.draw(logits, vocab, *laws)
        return found
