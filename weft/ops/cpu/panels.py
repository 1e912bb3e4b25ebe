"""Weights as the kernels read them: panels of 16 outputs, in which one line of 64 bytes holds the same inputs of all of them.

    float32     [N / 16][K][16]
    bfloat16    [N / 16][K / 2][16][2]

One copy serves a single row and a long prompt alike.  Legend.  N: outputs.  K: inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.errors import InvariantError
from weft.models.layout import PANEL

FORMATS = {torch.float32: 0, torch.bfloat16: 1}
"""Number formats that panels have, and what the kernels call them (`Format` in native/src/kernels.h)."""
SOURCES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Number formats that are packed without a detour."""


@dataclass(frozen=True, slots=True)
class Panels:
    """A weight [N, K].  memory: uint8, exactly its panels.  program: whose threads pack."""

    memory: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    program: Any

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    @property
    def format(self) -> int:
        return FORMATS[self.dtype]

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    def rows(self, first: int) -> Panels:
        """Outputs from `first` on, a multiple of PANEL."""
        if first % PANEL:
            raise InvariantError(f"panels cannot be cut at output {first}")
        start = first * self.shape[1] * self.dtype.itemsize
        return Panels(self.memory[start:], (self.shape[0] - first, self.shape[1]), self.dtype, self.program)

    def pack(self, source: Tensor, first: int = 0) -> None:
        """Outputs [first, first + n) become the rows of `source` [n, K]."""
        count, width = source.shape
        if width != self.shape[1] or first + count > self.shape[0]:
            raise InvariantError(f"{tuple(source.shape)} at {first} is no part of {self.shape}")
        if source.dtype not in SOURCES:
            source = source.float()
        source = source.contiguous()
        kind = SOURCES[source.dtype]
        self.program.pack(source.data_ptr(), kind, count, width, self.address, self.format, first)

    def unpacked(self) -> Tensor:
        """[N, K], a copy: for tests and for who must see a weight."""
        rows, width = -(-self.shape[0] // PANEL) * PANEL, self.shape[1]
        values = 4 // self.dtype.itemsize
        lines = self.memory[: math.prod((rows, width)) * self.dtype.itemsize].view(self.dtype)
        whole = lines.view(rows // PANEL, width // values, PANEL, values).permute(0, 2, 1, 3)
        return whole.reshape(rows, width)[: self.shape[0]].clone()
