"""Steps that are asked for tokens and nothing else, as nearly all are: what may be asked is looked up once for each batch.

Guesses, masks, log-probabilities, masses of attention, pooled states and early exits are each looked for in every sequence of
every step (`exec.runner`), and behind a pass, which has filled the caches, that costs more than the draws do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from weft.core import noise
from weft.exec import sampler
from weft.exec.batch import Batch
from weft.exec.mirror import Mirrored
from weft.types import Work, WorkResult

ASKING = ("sample", "skip", "kv.compress")
"""Slots whose techniques have a say in what becomes of a row, where a stack fills them."""


class Steady:
    """The draws of a batch that stands, of sequences for which `plain` holds.  program: of weft's kernels, which draw."""

    def __init__(self, batch: Batch, program: Any) -> None:
        self._sequences: list[Mirrored] = batch.sequences
        self._program = program
        self._laws = sampler.columns([s.sampling for s in self._sequences])
        self._where: tuple[Tensor | None, list[int], int] = None, [], 0

    def results(self, works: Sequence[Work], logits_NV: Tensor) -> list[WorkResult] | None:
        """The facts of a step with one row of each sequence, in their order; None where something needs a closer look."""
        known, where, vocab = self._where
        if logits_NV is not known:
            first, stride = logits_NV.data_ptr(), logits_NV.stride(0) * logits_NV.element_size()
            where, vocab = [first + i * stride for i in range(len(works))], logits_NV.shape[1]
            self._where = logits_NV, where, vocab
        keys = []
        for work, s, temperature in zip(works, self._sequences, self._laws[0], strict=True):
            if work.link is not None:
                return None
            keys.append(noise.row_key(s.seed, work.output) if temperature else 0)
        winners: list[int] = self._program.draw(where, vocab, *self._laws, keys)
        if min(winners) < 0:
            return None
        for work, s, token in zip(works, self._sequences, winners, strict=True):
            s.write(work.rows[0][1], (token,))  # a plan may speak of later rows before it says these
        return [WorkResult(rows=1, tokens=(token,)) for token in winners]


class Steadiness:
    """Which batches of the target are steady.  program: of weft's kernels, or None where they do not draw, and none is."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self._batch: Batch | None = None
        self._found: Steady | None = None

    def of(self, batch: Batch) -> Steady | None:
        if not batch.stands or self._program is None:
            return None
        if batch is not self._batch:
            steady = all(map(plain, batch.sequences))
            self._batch, self._found = batch, Steady(batch, self._program) if steady else None
        return self._found


def plain(s: Mirrored) -> bool:
    """Whether a sequence whose steps have one row each wants a token of them, and nothing else."""
    asked, stack = s.sampling, s.stack
    return not (
        any(stack.get(slot) is not None for slot in ASKING) or stack["draft"].guesses or s.grammar is not None or s.forced
        or max(s.count) >= 0 or asked.pooling or asked.logprobs >= 0 or sampler.adjusts(asked, 0)
    )  # fmt: skip
