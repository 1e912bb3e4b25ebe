"""Weights of few bits: unsigned integers, and for each group of inputs a scale and an offset.

    w[n, k] = scale[n, g] * value[n, k] + offset[n, g]        g = k // group

A symmetric format keeps no offsets: they are -2^(bits - 1) times the scales.  Scales and offsets are float16, in units of a
power of two that the weight has for all of them, so that small ones keep their digits.  A nested format has scales that are
whole multiples of one for each n, m[n, g] S[n] with |m| at most 15; S has 7 digits, so that all of these are float16 too.

Legend.  N: outputs.  K: inputs.  G: groups, K / group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weft.models.formats import MULTIPLES, WeightFormat

__all__ = [
    "Quantized", "WeightFormat", "assembled", "extremes", "multiples", "nested", "offset_grid", "quantize", "symmetric_grid"
]  # fmt: skip

SCALE_EXPONENT = 7
"""The largest scale of a weight is stored as a number of about 2 to this power."""
_NOTHING = torch.empty(0, 0, dtype=torch.uint8)
_DIGITS = 7
"""Binary digits of a row's scale in a nested format: with those of a multiple they are the 11 of float16."""
_STEP = 2.0**-24
"""The smallest float16."""
_LEAST = 4 * _STEP
"""Of a row's scale in a nested format: it is exact in units four times as large, too."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight [N, K].  values: uint8 [N, K], below 2^bits.  scales, offsets: float16 [N, G], times `unit`, a power of two."""

    values: Tensor
    scales: Tensor
    offsets: Tensor | None
    format: WeightFormat
    unit: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def steps(self) -> Tensor:
        """The scales themselves, float32 [N, G]."""
        return self.scales.float() * self.unit

    def zeros(self) -> Tensor | None:
        """Values that stand for 0, uint8 [N, G]; None: half the grid.  Whole where offsets are, as in everything stored."""
        if self.offsets is None:
            return None
        scales = self.scales.float()
        return (-self.offsets.float() / torch.where(scales == 0, 1.0, scales)).round_().to(torch.uint8)

    def dequantized(self) -> Tensor:
        """float32 [N, K]."""
        scales = self.steps()
        half = self.format.levels // 2
        offsets = -half * scales if self.offsets is None else self.offsets.float() * self.unit
        rows, width = self.shape
        values = self.values.view(rows, scales.shape[1], -1).float()
        return torch.addcmul(offsets.unsqueeze(-1), values, scales.unsqueeze(-1)).view(rows, width)


def assembled(values: Tensor, scales: Tensor, offsets: Tensor | None, format: WeightFormat) -> Quantized:
    """A `Quantized` of uint8 values [N, K] and float32 scales and offsets [N, G], which are rounded to float16."""
    top = float(
        torch.maximum(scales.abs().max(), torch.zeros(()) if offsets is None else offsets.abs().max() / format.levels)
    )
    unit = 2.0 ** (math.ceil(math.log2(top)) - SCALE_EXPONENT) if top > 0 and math.isfinite(top) else 1.0
    narrow = lambda x: (x / unit).to(torch.float16)
    return Quantized(values, narrow(scales), None if offsets is None else narrow(offsets), format, unit)


def symmetric_grid(largest: Tensor, format: WeightFormat) -> Quantized:
    """A grid without values for groups whose value of the largest magnitude is `largest`, float32 [N, G]."""
    grid = assembled(_NOTHING, -largest / (format.levels // 2), None, format)
    return replace(grid, scales=nested(grid.scales)) if format.nested else grid


def nested(scales: Tensor) -> Tensor:
    """The nearest whole multiples of one scale for each row, none of them 0 but for 0, float16 [N, G] as `scales`.

    The largest of a row is MULTIPLES times that scale, by which it is known again (`multiples`).  Groups whose scale becomes
    smaller lose a little of their largest value, and all others are finer: where scales are rounded up, the squared error of
    normal weights grows by 11 %, and so by 2.
    """
    wide = scales.float()
    top = wide.abs().amax(-1, keepdim=True)
    fraction, exponent = torch.frexp(top / MULTIPLES)
    base = torch.ldexp((fraction * 2**_DIGITS).ceil(), exponent - _DIGITS)
    base = (base / _LEAST).ceil() * _LEAST  # changes rows alone whose weights are a millionth of the largest
    times = (wide.abs() / torch.where(base == 0, 1.0, base)).round_().clamp_(1, MULTIPLES)
    times = torch.where((wide.abs() == top) & (top > 0), float(MULTIPLES), times)
    return (base * times * wide.sign()).to(torch.float16)


def multiples(scales: Tensor) -> tuple[Tensor, Tensor] | None:
    """(whole numbers [N, G], the scale [N, 1] of each row that they multiply), float32; None of scales that are not nested."""
    base = scales.float().abs().amax(-1, keepdim=True) / MULTIPLES
    times = (scales.float() / torch.where(base == 0, 1.0, base)).round_()
    # Rows a millionth the size of the largest lose digits where scales were written in other units than they are read in.
    return (times, base) if bool(((times * base - scales.float()).abs() <= _STEP).all()) else None


def offset_grid(low: Tensor, high: Tensor, format: WeightFormat) -> Quantized:
    """A grid without values for groups that span low to high, float32 [N, G]."""
    low, high, top = low.clamp(max=0), high.clamp(min=0), format.levels - 1
    scales = assembled(_NOTHING, (high - low) / top, None, format).steps()
    zeros = (-low / torch.where(scales == 0, 1.0, scales)).round_().clamp_(0, top)
    return assembled(_NOTHING, scales, -zeros * scales, format)


def extremes(grouped: Tensor) -> Tensor:
    """The value of the largest magnitude in each group, [N, G] of [N, G, group]."""
    return grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)


def quantize(weight: Tensor, format: WeightFormat, largest: Tensor | None = None) -> Quantized:
    """Round to nearest: float [N, K], each group on the grid that just holds it.

    Symmetric: the scale is the largest magnitude over 2^(bits - 1), with the sign that puts that value on the grid's deeper
    side, as it has one step more there.  With offsets: the grid runs from the smallest value, or 0 if that is smaller, to the
    largest, moved by less than half a step so that 0 is on it: the offset is a whole number of scales, which is what
    checkpoints can hold.

    largest: float32 [N, G], of a symmetric format; it stands for the groups' own values of the largest magnitude, and weights
    beyond the grid that it gives are rounded to the grid's ends.
    """
    rows, width = weight.shape
    grouped = weight.float().view(rows, format.groups(width), -1)
    half, top = format.levels // 2, format.levels - 1
    if format.symmetric:
        grid = symmetric_grid(extremes(grouped) if largest is None else largest, format)
    else:
        grid = offset_grid(grouped.amin(-1), grouped.amax(-1), format)
    # Values are rounded to the grid as it is stored.
    step = grid.steps().unsqueeze(-1)
    base = -half * step if grid.offsets is None else (grid.offsets.float() * grid.unit).unsqueeze(-1)
    values = ((grouped - base) / torch.where(step == 0, 1.0, step)).round_().clamp_(0, top).to(torch.uint8)
    return Quantized(values.view(rows, width), grid.scales, grid.offsets, format, grid.unit)
