"""A decoder along plain text, one window at a time, without an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.exec.batch import Batch, GroupBatch
from weft.exec.kvpool import KVPool
from weft.models.decoder import Decoder, build
from weft.models.spec import DecoderSpec, kv_groups

BLOCK_TOKENS = 16
Progress = Callable[[int, int], None]


class Along:
    """Computes windows of at most `length` tokens, each from its own beginning, by the reference operations.

    wanted: whether rows' logits are wanted; else only hooks see what is computed.  more: what else `build` takes, such as the
    kernels in place of the reference.
    """

    def __init__(
        self, folder: Path, spec: DecoderSpec, length: int, *, wanted: bool = True, dtype: str = "float32", ops: str = "ref",
        **more: Any,
    ) -> None:  # fmt: skip
        groups, block_bytes = kv_groups(spec, dtype, BLOCK_TOKENS)
        self.length, self.wanted = length, wanted
        self.decoder: Decoder = build(
            spec, folder, dtype=dtype, max_rows=length, max_samples=length if wanted else 1, groups=groups,
            invariant=False, ops=ops, **more,
        )  # fmt: skip
        counts = [-(-length // group.block_tokens) for group in groups]
        self._tables = [list(range(sum(counts[:i]), sum(counts[: i + 1]))) for i in range(len(counts))]
        device = self.decoder.device
        self._pool = KVPool(
            groups, spec, blocks=sum(counts), block_bytes=block_bytes, dtype=self.decoder.dtype, device=device
        )

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[len(ids), vocab], or the last row's where not all are wanted."""
        count = len(ids)
        rows = torch.arange(count)
        tables = [
            GroupBatch(
                torch.tensor([table]), torch.zeros(1, dtype=torch.int64), torch.tensor([count]), self._slots(i, rows)
            )
            for i, table in enumerate(self._tables)
        ]
        batch = Batch(torch.tensor(ids), rows, [0, count], tables, rows if self.wanted else rows[-1:])
        return self.decoder.forward(batch, self._pool)

    def _slots(self, index: int, rows: Tensor) -> Tensor:
        return self._tables[index][0] * self.decoder.groups[index].block_tokens + rows


def windows(ids: Sequence[int], length: int, most: int) -> list[list[int]]:
    """At most `most` windows of `length` tokens, spread evenly over a text; a text shorter than one is one window."""
    if len(ids) <= length:
        return [list(ids)]
    count = min(most, len(ids) // length)
    step = (len(ids) - length) / max(1, count - 1)
    return [list(ids[int(i * step) : int(i * step) + length]) for i in range(count)]


def each(found: Sequence[list[int]], progress: Progress | None) -> Iterator[list[int]]:
    for done, window in enumerate(found):
        yield window
        if progress is not None:
            progress(done + 1, len(found))
