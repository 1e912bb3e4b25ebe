"""From the stored tensors of one linear layer to `Quantized`: the packings of AWQ, GPTQ and compressed-tensors.

Every format says w[n, k] = scale[n, g] * (value[n, k] - zero[n, g]) with whole zeros.  Values and scales are kept exactly
(scales of 32 bits are rounded to 16, in units of a power of two).  Where zeros differ from half the grid the product
scale * zero is kept as a float16 offset, which moves a group by at most zero / 2048 steps: 0.8 % of a step in 4 bits, an
eighth of a step in 8.

Sources: the layouts as `WQLinear_GEMM` (autoawq 0.2.9), `QuantLinear` (auto-gptq 0.7.1) and `PackedQuantizationCompressor`
(compressed-tensors 0.20.0) write them; tests/models/packed holds files that those packages made.

Legend.  N: outputs.  K: inputs.  G: groups as stored.  b: bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import ConfigError
from weft.models.quantized import Quantized, WeightFormat, assembled

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Nibble of a 32-bit word that holds each of eight neighbouring columns, in AWQ's GEMM version."""


def unpacked(words: Tensor, bits: int) -> Tensor:
    """uint8 [R, 32 / b * C] of int32 [R, C]: values of `bits` bits, the lowest bits first."""
    octets = words.contiguous().view(-1).view(torch.uint8).view(words.shape[0], -1)
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), -1).view(octets.shape[0], -1)


def packed(values: Tensor, bits: int) -> Tensor:
    """int32 [R, ceil(C b / 32)] of uint8 [R, C]: the inverse of `unpacked`, filled up with zeros."""
    width, per_word = values.shape[1], 32 // bits
    if width % per_word:
        values = torch.nn.functional.pad(values, (0, -width % per_word))
    if bits == 4:
        values = values[:, ::2] | values[:, 1::2] << 4
    return values.contiguous().view(-1).view(torch.int32).view(values.shape[0], -1)


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, form: WeightFormat, name: str) -> Quantized:
    """qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales [G, N]; eight columns in a word, in `AWQ_ORDER`."""

    def columns(words: Tensor) -> Tensor:
        nibbles = unpacked(words, 4)
        return nibbles.view(nibbles.shape[0], -1, 8)[:, :, AWQ_ORDER].reshape(nibbles.shape[0], -1).t()

    return whole(columns(qweight).contiguous(), scales.t(), columns(qzeros), form, name)


def gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, form: WeightFormat, v2: bool, name: str
) -> Quantized:
    """qweight int32 [K b / 32, N], qzeros int32 [G, N b / 32], scales [G, N], g_idx [K] the group of each input.

    v2: zeros are stored as they are; the first version stores them less one.
    """
    width = qweight.shape[0] * 32 // form.bits
    if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(width) // (width // scales.shape[0])):
        raise ConfigError(
            f"{name}.g_idx parts the inputs into groups out of their order (act-order), which weft can't read; "
            "use a version of the checkpoint with desc_act false, or one quantized with static groups"
        )
    zeros = unpacked(qzeros, form.bits).t()
    if not v2:
        zeros = zeros + 1 & form.levels - 1
    return whole(unpacked(qweight.t(), form.bits), scales.t(), zeros, form, name)


def compressed(
    weight: Tensor, scale: Tensor, zeros: Tensor | None, form: WeightFormat, width: int, name: str
) -> Quantized:
    """weight int32 [N, ceil(K b / 32)] or int8 [N, K], scale [N, G] or [1], zeros int32 [ceil(N b / 32), G] or int8 [N, G].

    Packed values have half the grid added to them, bytes have not.
    """
    rows = weight.shape[0]
    half = form.levels // 2
    if weight.dtype is torch.int8:
        values = (weight.to(torch.int16) + half).to(torch.uint8)
    else:
        values = unpacked(weight, form.bits)[:, :width].contiguous()
    if zeros is not None:
        if zeros.dtype is torch.int8:
            zeros = (zeros.to(torch.int16) + half).to(torch.uint8).reshape(-1, scale.shape[-1])
        else:
            zeros = unpacked(zeros.t(), form.bits)[:, :rows].t()
    scale = scale.reshape(1, 1) if scale.dim() < 2 else scale
    return whole(values, scale.expand(rows, -1), zeros, form, name)


def whole(values: Tensor, scales: Tensor, zeros: Tensor | None, form: WeightFormat, name: str) -> Quantized:
    """A `Quantized` of uint8 values [N, K], scales [N, G] and whole zeros [N, G]; None: half the grid.

    Where a stored group is larger than the format's its scale is repeated.  A format that is symmetric asks for zeros of half
    the grid.
    """
    groups = form.groups(values.shape[1])
    scales = scales.float()
    if not bool(torch.isfinite(scales).all()):
        raise ConfigError(f"the scales of {name} are not all finite: the checkpoint is damaged; fetch it again")
    if scales.abs().max() > 2.0**100:
        raise ConfigError(f"the scales of {name} exceed anything a weight can be: the checkpoint is damaged")
    half = form.levels // 2
    if form.symmetric:
        if zeros is not None and bool((zeros != half).any()):
            raise ConfigError(
                f"{name} has zeros beside {half}, though quantization_config says that it is symmetric; "
                "correct config.json (sym or symmetric: false)"
            )
        zeros = None
    elif zeros is None:
        zeros = torch.full(scales.shape, half, dtype=torch.uint8)
    offsets = None if zeros is None else -(zeros.float() * scales)
    repeat = groups // scales.shape[1]
    if repeat > 1:
        scales = scales.repeat_interleave(repeat, 1)
        offsets = None if offsets is None else offsets.repeat_interleave(repeat, 1)
    return assembled(values, scales.contiguous(), None if offsets is None else offsets.contiguous(), form)
