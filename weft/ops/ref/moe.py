"""A mixture of experts: route each row to its best experts, compute each expert over its rows, add up.

Legend.  T: rows.  E: experts.  k: experts per row.  I: inner size of an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weft.ops.ref.basic import Slabs, gated, linear


def route(logits_TE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Weights float32 [T, k] and ids int64 [T, k] of each row's experts, best first: softmax over all experts, then top k."""
    weights, ids = torch.softmax(logits_TE.float(), dim=-1).topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids


def experts(
    x_TW: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    gate_up_E: Tensor,
    down_E: Tensor,
    activation: str,
    out_TW: Tensor,
    slabs_of: Callable[[int], Slabs],
) -> None:
    """out[t] = sum over t's experts of weight * expert(x[t]), added in the order of expert ids.

    gate_up_E [E, 2 I, width], down_E [E, width, I].  slabs_of(rows) says how to cut an expert's rows into products.
    A row meets an expert at most once, so that the order of the sum is one and the same in every batch.
    """
    out_TW.zero_()
    flat = ids_Tk.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=gate_up_E.shape[0]).tolist()
    row_of = torch.div(order, ids_Tk.shape[1], rounding_mode="floor")
    share = weights_Tk.flatten()[order].to(x_TW.dtype)
    inner = down_E.shape[2]
    first = 0
    for expert, count in enumerate(counts):
        last = first + count
        for start, rows in slabs_of(count):
            part = slice(first + start, min(first + start + rows, last))
            at = row_of[part]
            x = x_TW.new_zeros(rows, x_TW.shape[1])
            x[: at.shape[0]] = x_TW[at]
            both, mid, y = x.new_empty(rows, 2 * inner), x.new_empty(rows, inner), torch.empty_like(x)
            one = [(0, rows)]
            linear(x, gate_up_E[expert], None, both, one)
            gated(both, activation, mid)
            linear(mid, down_E[expert], None, y, one)
            out_TW.index_add_(0, at, y[: at.shape[0]] * share[part, None])
        first = last
