"""Quantized tensors of GGUF: their exact values, and the same as `Quantized` weights.

A row is cut in blocks of 32 or 256 values.  A block begins or ends with float16 factors; q are unsigned integers:

    Q8_0  32    d, int8 x 32                            w = d q'                      q' = q - 128
    Q4_0  32    d, nibbles x 32                         w = d (q - 8)
    Q4_1  32    d, m, nibbles x 32                      w = d q + m
    Q5_0  32    d, fifth bits u32, nibbles x 32         w = d (q - 16)
    Q5_1  32    d, m, fifth bits u32, nibbles x 32      w = d q + m
    Q4_K  256   d, e, s and t x 8 in 12 bytes, nibbles                  w = (d s) q - (e t)       8 groups of 32
    Q5_K  256   d, e, s and t x 8 in 12 bytes, fifth bits, nibbles      w = (d s) q - (e t)       8 groups of 32
    Q6_K  256   nibbles, upper two bits, int8 s x 16, d                 w = (d s) (q - 32)        16 groups of 16

Everything is computed in float32, with one rounding where ggml's reference rounds: a product of two factors, its product with q,
and the sum.  Source: ggml's block structures; checked bit for bit against the `gguf` package.

Legend.  N: rows.  K: values in a row.  B: blocks, over all rows.  G: groups of a row that share a scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.errors import ConfigError
from weft.models.formats import WeightFormat
from weft.models.gguf.header import TYPES, TensorType
from weft.models.quantized import Quantized, assembled

BY_NAME = {kind.name: kind for kind in TYPES.values()}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types whose values are numbers as torch has them."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Integers and factors.  q: uint8 [B, groups, group].  scale: float32 [B, groups].  offset: the same, or None.

    w = scale * (q - middle), or scale * q + offset.  exact: whether scale and offset are float16 as they stand in the file.
    """

    q: Tensor
    scale: Tensor
    offset: Tensor | None = None
    middle: int = 0
    exact: bool = True


def _half(raw_BX: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, as float32 [B, 1]."""
    return raw_BX[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(raw_BX: Tensor, run: int) -> Tensor:
    """Low, then high halves of every `run` bytes: uint8 [B, bytes / run, 2, run]."""
    runs = raw_BX.reshape(raw_BX.shape[0], -1, 1, run)
    return torch.cat([runs & 15, runs >> 4], dim=2)


def _fifth(raw_BX: Tensor) -> Tensor:
    """The bits of a little-endian u32, lowest first, as uint8 [B, 32]."""
    bits = torch.arange(8, dtype=torch.uint8)
    return (raw_BX.unsqueeze(-1) >> bits & 1).reshape(raw_BX.shape[0], 32)


def _q8_0(raw: Tensor) -> Blocks:
    return Blocks((raw[:, 2:] ^ 128).unsqueeze(1), _half(raw, 0), middle=128)


def _q4_0(raw: Tensor) -> Blocks:
    return Blocks(_nibbles(raw[:, 2:], 16).view(-1, 1, 32), _half(raw, 0), middle=8)


def _q4_1(raw: Tensor) -> Blocks:
    return Blocks(_nibbles(raw[:, 4:], 16).view(-1, 1, 32), _half(raw, 0), _half(raw, 2))


def _q5_0(raw: Tensor) -> Blocks:
    q = _nibbles(raw[:, 6:], 16).view(-1, 32) | _fifth(raw[:, 2:6]) << 4
    return Blocks(q.unsqueeze(1), _half(raw, 0), middle=16)


def _q5_1(raw: Tensor) -> Blocks:
    q = _nibbles(raw[:, 8:], 16).view(-1, 32) | _fifth(raw[:, 4:8]) << 4
    return Blocks(q.unsqueeze(1), _half(raw, 0), _half(raw, 2))


def _sixes(raw_BX: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima of 6 bits each that 12 bytes hold, float32 [B, 8] each.

    Bytes 0-3 and 4-7 hold the first four of each in their low 6 bits; bytes 8-11 the low nibbles of the others (scale low,
    minimum high), whose upper two bits are the upper two of bytes 0-3 and 4-7.
    """
    a, b, c = raw_BX.split(4, dim=1)
    scales = torch.cat([a & 63, c & 15 | (a >> 6) << 4], dim=1)
    minima = torch.cat([b & 63, c >> 4 | (b >> 6) << 4], dim=1)
    return scales.float(), minima.float()


def _k(raw: Tensor, q: Tensor) -> Blocks:
    scales, minima = _sixes(raw[:, 4:16])
    return Blocks(q, _half(raw, 0) * scales, -(_half(raw, 2) * minima), exact=False)


def _q4_k(raw: Tensor) -> Blocks:
    return _k(raw, _nibbles(raw[:, 16:], 32).view(-1, 8, 32))


def _q5_k(raw: Tensor) -> Blocks:
    group = torch.arange(8, dtype=torch.uint8).view(1, 8, 1)
    fifth = raw[:, 16:48].unsqueeze(1) >> group & 1
    return _k(raw, _nibbles(raw[:, 48:], 32).view(-1, 8, 32) | fifth << 4)


def _q6_k(raw: Tensor) -> Blocks:
    """Each half of a block: 64 bytes of nibbles (all low ones first), and 32 of the upper bits, 2 for each run of 32 values."""
    run = torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 1, 4, 1)
    upper = raw[:, 128:192].reshape(-1, 2, 1, 32) >> run & 3
    q = _nibbles(raw[:, :128], 64).view(-1, 2, 4, 32) | upper << 4
    scales = raw[:, 192:208].contiguous().view(torch.int8).float()
    return Blocks(q.view(-1, 16, 16), _half(raw, 208) * scales, middle=32, exact=False)


READERS: dict[str, Callable[[Tensor], Blocks]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
SYMMETRIC = ("Q8_0", "Q4_0", "Q5_0", "Q6_K")
"""Types without offsets."""
EXACT = (*PLAIN, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Types that are kept to the last bit: numbers, and integers whose scales and offsets are float16 in the file."""
READABLE = (*PLAIN, *READERS)
"""Types that weft reads."""


def _blocks(raw: Tensor, kind: TensorType) -> Blocks:
    if kind.name not in READERS:
        raise ConfigError(f"tensors of type {kind.name} are not read; weft reads {', '.join(READABLE)}")
    return READERS[kind.name](raw.reshape(-1, kind.bytes))


def dequantized(raw: Tensor, type: str, shape: tuple[int, ...]) -> Tensor:
    """The values of a tensor: float32 of `shape`; of F32, F16 and BF16 as they stand, in their own format.

    raw: its bytes, uint8.  type: as GGUF names it.  Raises ConfigError for a type that is not read.
    """
    if type in PLAIN:
        return raw.contiguous().view(PLAIN[type]).view(shape)
    blocks = _blocks(raw, BY_NAME[type])
    scale = blocks.scale.unsqueeze(-1)
    if blocks.offset is None:
        return (blocks.q.float().sub_(blocks.middle)).mul_(scale).view(shape)
    return blocks.q.float().mul_(scale).add_(blocks.offset.unsqueeze(-1)).view(shape)


def quantized(raw: Tensor, type: str, shape: tuple[int, int]) -> Quantized:
    """A matrix [N, K] as weft keeps weights of few bits: every integer as it is, in groups of 32 (Q6_K: 16).

    Q4_0 has 4 bits and no offsets, Q4_1 and Q4_K have 4 bits and offsets, Q5_1 and Q5_K 8 bits and offsets, the others 8 bits
    and no offsets.  Scales and offsets are exact where the file has them in float16; products of the K types are rounded to it.
    Raises ConfigError for a type that is not made of integers.
    """
    blocks = _blocks(raw, BY_NAME[type])
    format = format_of(type)
    q = blocks.q if blocks.offset is not None else blocks.q + (format.levels // 2 - blocks.middle)
    groups = (shape[0], -1)
    scale = blocks.scale.reshape(groups)
    offset = None if blocks.offset is None else blocks.offset.reshape(groups)
    if not blocks.exact:
        return assembled(q.reshape(shape), scale, offset, format)
    return Quantized(
        q.reshape(shape), scale.to(torch.float16), None if offset is None else offset.to(torch.float16), format
    )


def format_of(type: str) -> WeightFormat:
    """The format that holds a type's integers (see `quantized`)."""
    return WeightFormat(4 if type.startswith("Q4") else 8, 16 if type == "Q6_K" else 32, type in SYMMETRIC)


def unpaired(rows: Tensor, head: int) -> Tensor:
    """Rows of queries or keys in the order 0, 1, 2, ... of each head, from 0, d/2, 1, d/2 + 1, ...; head: rows of one."""
    tail = rows.shape[1:]
    return rows.view(-1, head // 2, 2, *tail).transpose(1, 2).reshape(rows.shape)


def windows(shape: tuple[int, ...], most: int, unit: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of runs of rows that hold about `most` values, each a multiple of `unit` rows (but for the end)."""
    rows, width = shape[0], math.prod(shape[1:])
    step = max(1, most // (width * unit)) * unit
    for first in range(0, rows, step):
        yield first, min(first + step, rows)
