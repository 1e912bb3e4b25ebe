"""What adapters add to the products of one batch: rows grouped by adapter, once a step.

Legend.  T: rows of the batch.  K: input width.  N: output width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.slots import Adapt

SLOT = "adapt"


@dataclass(frozen=True, slots=True)
class Deltas:
    """groups: (a technique's instance, the batch's rows that it changes), one for each adapter; a slice where they adjoin."""

    groups: tuple[tuple[Adapt, slice | Tensor], ...]

    @classmethod
    def of(cls, sequences: Sequence[Any], bounds: Sequence[int], device: torch.device) -> Deltas | None:
        """None where no sequence of the batch has an adapter.

        sequences: `exec.mirror.Mirrored`, of which sequence s owns rows bounds[s]:bounds[s + 1].
        """
        found: dict[int, tuple[Adapt, list[tuple[int, int]]]] = {}
        for s, sequence in enumerate(sequences):
            part = sequence.stack.get(SLOT)
            if part is not None and bounds[s] < bounds[s + 1]:
                found.setdefault(id(part.adapter), (part, []))[1].append((bounds[s], bounds[s + 1]))
        if not found:
            return None
        return cls(tuple((part, _rows(spans, device)) for part, spans in found.values()))

    def add(self, layer: int, product: str, x_TK: Tensor, out_TN: Tensor, first: int = 0) -> None:
        """Change what a product gave.  out_TN: its output columns from `first` on.  Rows beyond the batch's stay as they are."""
        stop = first + out_TN.shape[1]
        for part, rows in self.groups:
            whole = isinstance(rows, slice)
            x = x_TK[rows] if whole else x_TK.index_select(0, rows)  # type: ignore[arg-type]
            delta = part.apply(layer, product, x)
            if delta is None:
                continue
            mine = delta[:, first:stop]
            if whole:
                out_TN[rows] += mine
            else:
                out_TN.index_add_(0, rows, mine)  # type: ignore[arg-type]


def _rows(spans: list[tuple[int, int]], device: torch.device) -> slice | Tensor:
    if all(a[1] == b[0] for a, b in itertools.pairwise(spans)):
        return slice(spans[0][0], spans[-1][1])
    return torch.cat([torch.arange(start, stop) for start, stop in spans]).to(device)
