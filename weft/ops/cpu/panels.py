"""Weights as the kernels read them: panels of 16 outputs, in which one line of 64 bytes holds the same inputs of all of them.

    float32     [N / 16][K][16]                 bfloat16    [N / 16][K / 2][16][2]
    int8        [N / 16][K / 4][16][4]          int4        [N / 16][K / 8][16][8]

Behind the lines of a panel of whole numbers stand its scales and its offsets, or the outputs' scales and the groups' multiples
of them (`Weight` in native/src/kernels.h).  One copy serves a single row and a long prompt alike.

Legend.  N: outputs.  K: inputs.  G: groups of inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.errors import ConfigError, InvariantError
from weft.models.layout import PANEL, panel_bytes
from weft.models.quantized import Quantized, WeightFormat, multiples, offset_grid, symmetric_grid

FORMATS = {torch.float32: 0, torch.bfloat16: 1}
"""Number formats that panels have, and what the kernels call them (`Format` in native/src/kernels.h)."""
BITS = {8: 2, 4: 3}
"""The same for whole numbers of so many bits."""
SOURCES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Number formats that are packed without a detour."""
ROUNDED = (torch.float32, torch.bfloat16)
"""Those that are rounded to whole numbers without one."""
WINDOW = 1 << 20
"""Values that are rounded at a time."""
HALF_LIMIT = 65504.0
"""The largest float16."""


@dataclass(frozen=True, slots=True)
class Panels:
    """A weight [N, K].  memory: uint8, exactly its panels.  format: of its values.  program: whose threads pack.  module: its."""

    memory: Tensor
    shape: tuple[int, int]
    format: torch.dtype | WeightFormat
    program: Any
    module: Any

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    @property
    def weight(self) -> Any:
        """As the kernels know it (their `Weight`)."""
        outs, width = self.shape
        if isinstance(self.format, torch.dtype):
            return self.module.Weight(self.memory.data_ptr(), outs, width, FORMATS[self.format])
        group = self.format.group or width
        return self.module.Weight(
            self.memory.data_ptr(), outs, width, BITS[self.format.bits], group, not self.format.symmetric,
            self.format.nested and group < width,
        )  # fmt: skip

    def rows(self, first: int) -> Panels:
        """Outputs from `first` on, a multiple of PANEL."""
        if first % PANEL:
            raise InvariantError(f"panels cannot be cut at output {first}")
        outs, width = self.shape
        format = self.format.itemsize if isinstance(self.format, torch.dtype) else self.format
        start = first // PANEL * panel_bytes(width, format)
        return Panels(self.memory[start:], (outs - first, width), self.format, self.program, self.module)

    def holds(self, given: WeightFormat) -> bool:
        """Whether whole numbers of that format are kept as they are: at least as many bits, and groups as small or smaller."""
        own, width = self.format, self.shape[1]
        if isinstance(own, torch.dtype):
            return True
        alike = not own.symmetric or (own.bits, own.symmetric) == (given.bits, given.symmetric)
        alike &= given.nested or not own.nested
        return own.bits >= given.bits and alike and own.groups(width) % given.groups(width) == 0

    def pack(self, source: Tensor | Quantized, first: int = 0) -> None:
        """Outputs [first, first + n) become the rows of `source` [n, K], rounded to nearest where they have to be rounded.

        Raises ConfigError for values that are not finite, where the format is of whole numbers.
        """
        count, width = source.shape
        if width != self.shape[1] or first + count > self.shape[0]:
            raise InvariantError(f"{tuple(source.shape)} at {first} is no part of {self.shape}")
        if not isinstance(self.format, torch.dtype):
            if isinstance(source, Quantized):
                return self._pack_values(source, first)
            for at in range(0, count, step := max(1, WINDOW // width)):
                self._pack_rounded(source[at : at + step], first + at)
            return None
        if isinstance(source, Quantized):
            source = source.dequantized()
        if source.dtype not in SOURCES:
            source = source.float()
        source = source.contiguous()
        self.program.pack(self.weight, source.data_ptr(), SOURCES[source.dtype], count, first)
        return None

    def _pack_rounded(self, source: Tensor, first: int) -> None:
        """What `quantize` gives."""
        format, (count, width) = self.format, source.shape
        assert isinstance(format, WeightFormat)
        source = (source if source.dtype in ROUNDED else source.float()).contiguous()
        low, high = torch.empty(2, count, format.groups(width))
        self.program.spans(
            source.data_ptr(), SOURCES[source.dtype], count, width, width // low.shape[1], low.data_ptr(),
            0 if format.symmetric else high.data_ptr(),
        )  # fmt: skip
        scales, offsets = _told(symmetric_grid(low, format) if format.symmetric else offset_grid(low, high, format))
        _sound(scales, offsets)
        self.program.pack_rounded(
            self.weight, source.data_ptr(), SOURCES[source.dtype], scales.data_ptr(),
            0 if offsets is None else offsets.data_ptr(), count, first,
        )  # fmt: skip

    def _pack_values(self, source: Quantized, first: int) -> None:
        """As they are, in a format that holds them: with as many bits or more, in groups as small or smaller."""
        own, given = self.format, source.format
        assert isinstance(own, WeightFormat)
        if not self.holds(given):
            raise InvariantError(f"weights of {given} do not fit into {own}")
        scales, offsets = _told(source)
        if not own.symmetric and offsets is None:
            offsets = scales * -(given.levels // 2)
        _sound(scales, offsets)
        if own.nested and own.groups(self.shape[1]) > 1 and multiples(source.scales) is None:
            raise ConfigError(
                "a weight's scales are not whole multiples of one for each row, though config.json says that they are "
                "nested (weft_scales); remove that entry"
            )
        values = source.values.contiguous()
        self.program.pack_values(
            self.weight, values.data_ptr(), scales.data_ptr(), 0 if offsets is None else offsets.data_ptr(),
            scales.shape[1], 0, values.shape[0], first,
        )  # fmt: skip

    def unpacked(self, rows: Sequence[int] | None = None) -> Tensor:
        """[N, K], or some of its rows, a copy, whole numbers as float32: for tests and for who must see a weight."""
        outs, width = self.shape[0] if rows is None else len(rows), self.shape[1]
        out = torch.empty(outs, width)
        program = self.module.Program(1, "portable")
        index = program.embed(self.weight, 1.0, out.data_ptr(), width)
        step, tokens = self.module.Step(), torch.arange(outs) if rows is None else torch.tensor(rows, dtype=torch.int64)
        step.rows(outs, tokens.data_ptr(), 0, 0, 0, 0, 0, 0)
        program.run(index, index + 1, step)
        return out.to(self.format) if isinstance(self.format, torch.dtype) else out


def _told(grid: Quantized) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets, float32 [N, G]."""
    offsets = None if grid.offsets is None else (grid.offsets.float() * grid.unit).contiguous()
    return (grid.scales.float() * grid.unit).contiguous(), offsets


def _sound(scales: Tensor, offsets: Tensor | None) -> None:
    """Raises ConfigError where they are no numbers that panels can hold."""
    for what in (scales, offsets):
        if what is not None and not (what.isfinite().all() and what.abs().max() <= HALF_LIMIT):
            raise ConfigError("a weight has values that are too large or not finite, so that it has no scale")


@dataclass(frozen=True, slots=True)
class Stacked:
    """A weight [E, N, K]: the panels of each of E experts."""

    parts: tuple[Panels, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.parts), *self.parts[0].shape

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def unpacked(self) -> Tensor:
        """[E, N, K], a copy."""
        return torch.stack([part.unpacked() for part in self.parts])
