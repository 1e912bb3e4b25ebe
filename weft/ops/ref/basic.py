"""Row-wise operations: products with weights, RMSNorm, activations, soft caps, embeddings.

Legend.  T: rows.  K: input width.  N: output width.  A *slab* is a range of rows that one matrix product computes; which slabs
are used decides whether a row's bits depend on its neighbours, see `tiles.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.ops.ref.rope import row_slabs

Slabs = Sequence[tuple[int, int]]
"""(first row, rows) of each product.  The last slab may reach past the batch, into rows that nobody reads."""


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, out_TN: Tensor, slabs: Slabs) -> None:
    """out = x @ weight.T + bias, slab by slab.  x and out hold at least the slabs' rows, and are contiguous."""
    weight_KN = weight_NK.t()
    for start, rows in slabs:
        x, out = x_TK[start : start + rows], out_TN[start : start + rows]
        if bias_N is None:
            torch.mm(x, weight_KN, out=out)
        else:
            torch.addmm(bias_N, x, weight_KN, out=out)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, out: Tensor) -> None:
    """out = x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension, in float32.

    x, out: [T, D] or [T, H, D], maybe strided, maybe the same memory.
    """
    scale = weight.float() + offset if offset else weight.float()
    for rows in row_slabs(x.shape[0], x[0].numel() * 12 if x.shape[0] else 1):
        wide = x[rows].float()
        root = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
        out[rows] = wide * root * scale


def softcap_(x: Tensor, cap: float) -> Tensor:
    """x = cap * tanh(x / cap), in place."""
    return x.div_(cap).tanh_().mul_(cap)


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)), float32 and contiguous.

    Written out, since torch's fused kernel computes the last few elements of a tensor by other instructions than the rest
    (their bits would depend on the shape), while its exp does not.
    """
    return x / torch.neg(x).exp_().add_(1.0)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form, x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))); written out for the reason given at `silu`."""
    inner = x * x * x * 0.044715
    return inner.add_(x).mul_(0.7978845608028654).tanh_().add_(1.0).mul_(x).mul_(0.5)


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


def gated(gate_up: Tensor, activation: str, out: Tensor) -> None:
    """out [T, I] = activation(gate) * up, with gate_up [T, 2 I] = (gate | up)."""
    inner = out.shape[1]
    act = ACTIVATIONS[activation]
    for rows in row_slabs(out.shape[0], inner * 16):
        gate = act(gate_up[rows, :inner].float().contiguous())
        out[rows] = gate.mul_(gate_up[rows, inner:])


def embed(tokens_T: Tensor, table: Tensor, scale: float, out: Tensor) -> None:
    """out [T, width] = table[tokens] * scale.  Rows of negative tokens get some row: vectors replace them."""
    torch.index_select(table, 0, tokens_T.clamp_min(0), out=out)
    if scale != 1.0:
        out.mul_(torch.tensor(scale, dtype=out.dtype, device=out.device))
