"""A decoder that computes the logits of some tokens only: a head of fewer rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from weft.models import kernels as cpu
from weft.models.decoder import Decoder
from weft.models.layout import stored_bytes
from weft.models.memory import host_memory
from weft.native import module as kernels
from weft.ops.cpu.panels import Panels


def trimmed(whole: Decoder, ids: Sequence[int], threads: int, isa: str) -> Decoder:
    """The same decoder with one row of the head for each id, in this order; itself where there are none, or all.

    Weights are shared but for the rows that are kept, which stand in memory of their own.
    """
    if not ids or len(ids) >= whole.spec.vocab:
        return whole
    spec = replace(whole.spec, tied=False, kept=tuple(ids))
    source, native = whole.tensors["embed" if whole.spec.tied else "head"], whole.native
    if native is not None:
        inputs = next(name for name, code in cpu.INPUTS.items() if code == native.inputs)
        native = cpu.Native(kernels(), spec, threads, isa, inputs)
        size = stored_bytes(spec, str(whole.dtype).removeprefix("torch."), True, {})["head"]
        memory = host_memory(size, torch.device("cpu"))
        head = Panels(memory, (len(ids), spec.width), whole.dtype, native.program, native.module)
        head.pack(source.unpacked(ids), 0)
    else:
        head = source[torch.tensor(ids, device=source.device)].contiguous()
    return Decoder(
        spec, whole.weights, {**whole.tensors, "head": head}, max_rows=whole.max_rows, max_samples=whole.max_samples,
        groups=whole.groups, invariant=whole.invariant, ops=whole.ops, native=native,
    )  # fmt: skip
