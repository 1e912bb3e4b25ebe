"""Rotary position embedding: frequencies of each kind, cosine and sine tables, rotation in place.

Legend.  T: rows.  H: heads.  D: head_dim.  F: rotated pairs, rope.dim / 2.  Dimension i turns together with dimension i + F.
Everything is computed in float32, whatever the model's format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from weft.models.spec import RopeSpec

SLAB_BYTES = 4 << 20
"""Scratch of one elementwise slab."""


def row_slabs(rows: int, row_bytes: int) -> Iterator[slice]:
    """Slices of at most SLAB_BYTES that cover `rows` rows, so that scratch does not grow with the batch."""
    step = max(1, SLAB_BYTES // max(row_bytes, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def frequencies(rope: RopeSpec) -> Tensor:
    """Radians per position of each rotated pair, float32 [F].

    llama3: Llama 3.1's rule: pairs whose wavelength exceeds original / low_factor turn `factor` times slower, those below
    original / high_factor are left alone, and between them the two are mixed linearly in original / wavelength.
    yarn: arXiv:2309.00071, section 3.2: pairs that make fewer than beta_slow rotations over `original` positions turn `factor`
    times slower, those that make more than beta_fast are left alone, and between them a ramp over the dimension mixes both.
    """
    exponent = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    wave = rope.theta**exponent
    plain = 1.0 / wave
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "divided":
        return plain / torch.tensor(rope.divisors)
    if rope.kind == "llama3":
        turns = rope.original / (2 * math.pi / plain)
        mix = ((turns - rope.low_factor) / (rope.high_factor - rope.low_factor)).clamp(0.0, 1.0)
        return (1.0 - mix) * plain / rope.factor + mix * plain
    ends = [_yarn_dimension(rope, beta) for beta in (rope.beta_fast, rope.beta_slow)]
    if rope.truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], rope.dim - 1)
    width = high - low if high != low else 0.001  # a ramp of no width is a step
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    slow = 1.0 / (rope.factor * wave)
    return slow * ramp + plain * (1.0 - ramp)


def _yarn_dimension(rope: RopeSpec, rotations: float) -> float:
    """The (fractional) pair that makes `rotations` turns over the original context."""
    return rope.dim * math.log(rope.original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))


def tables(positions_T: Tensor, inverse_F: Tensor, attention_factor: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [T, F] each, times the attention factor."""
    angle = positions_T.to(torch.float32)[:, None] * inverse_F
    return angle.cos() * attention_factor, angle.sin() * attention_factor


def apply_rope(x_THD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> None:
    """Rotate the first 2 F dimensions of every head in place.  x may be a strided view, in any float format."""
    pairs = cos_TF.shape[1]
    for rows in row_slabs(x_THD.shape[0], x_THD.shape[1] * pairs * 16):
        x = x_THD[rows]
        cos, sin = cos_TF[rows, None, :], sin_TF[rows, None, :]
        left, right = x[..., :pairs].float(), x[..., pairs : 2 * pairs].float()
        turned_left = left * cos - right * sin
        turned_right = right * cos + left * sin
        x[..., :pairs] = turned_left
        x[..., pairs : 2 * pairs] = turned_right


def rotate_by(keys: Tensor, rope: RopeSpec, delta: int) -> Tensor:
    """Keys [n, heads, head_dim] as if they stood `delta` positions later (a pure rotation; the attention factor stays)."""
    positions = torch.full((keys.shape[0],), delta, dtype=torch.int64, device=keys.device)
    cos, sin = tables(positions, frequencies(rope).to(keys.device), 1.0)
    turned = keys.clone()
    apply_rope(turned, cos, sin)
    return turned
