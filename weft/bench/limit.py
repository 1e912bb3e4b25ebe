"""The limit of decoding: what a step must read at least, and how fast this machine reads.

A decode step computes one row for each sequence, so nearly every weight is read for a handful of multiplications: the time of a
step is bounded by bytes over bandwidth (Williams et al., Roofline, CACM 52(4), 2009).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weft import native
from weft.models.formats import WeightFormat
from weft.models.layout import layer_shapes, stored_bytes
from weft.models.spec import DecoderSpec
from weft.types import GroupKind, GroupSpec

if TYPE_CHECKING:
    from weft.exec.build import Setup

READ_BYTES = 1 << 30
"""Bytes that the bandwidth is measured over: far more than any cache holds."""
ROUNDS = 5
ROW = 4096


def experts_hit(num: int, top_k: int, rows: int) -> float:
    """Distinct experts that `rows` rows reach, expected when each row's top_k are drawn evenly and independently."""
    return num * (1.0 - (1.0 - top_k / num) ** rows)


def weight_bytes_read(
    spec: DecoderSpec, dtype: str, batch: int, panels: bool = False, formats: Mapping[str, WeightFormat] | None = None
) -> int:
    """Bytes of weights that a decode step of `batch` sequences reads, as they are stored: each weight once, scales too.

    Of the embedding only the batch's rows, unless it is also the output projection; of a mixture only the experts that are hit
    (see `experts_hit`: real routers are less even and hit fewer).
    """
    sizes = stored_bytes(spec, dtype, panels, formats)
    read = 0.0
    for name, size in sizes.items():
        if name == "embed" and not spec.tied:
            read += size * min(batch, spec.vocab) / spec.vocab
        elif "." not in name:
            read += size
    for layer in spec.layers:
        for name in layer_shapes(spec, layer):
            share = 1.0
            if layer.experts is not None and name.startswith("experts_"):
                share = experts_hit(layer.experts.num, layer.experts.top_k, batch) / layer.experts.num
            read += sizes[f"{layer.weights}.{name}"] * share
    return round(read)


def kv_bytes_read(groups: Sequence[GroupSpec], batch: int, context: int) -> int:
    """Bytes of keys and values that `batch` sequences of `context` positions read in a step; windows read their last ones."""
    return batch * sum(
        g.entry_bytes * min(context, g.window or context) for g in groups if g.kind is not GroupKind.PARKED
    )


def bytes_per_step(
    spec: DecoderSpec,
    groups: Sequence[GroupSpec],
    dtype: str,
    batch: int,
    context: int,
    panels: bool = False,
    formats: Mapping[str, WeightFormat] | None = None,
) -> int:
    """Stored bytes that a decode step must read: weights once, and the KV of the batch at `context` positions each."""
    return weight_bytes_read(spec, dtype, batch, panels, formats) + kv_bytes_read(groups, batch, context)


def read_by(setup: Setup, batch: int, context: int) -> int:
    """`bytes_per_step` of the target of a set-up."""
    return bytes_per_step(
        setup.spec, setup.groups_of("target"), setup.dtype, batch, context, setup.ops["target"].panels,
        setup.formats,
    )  # fmt: skip


def read_gb_s(threads: int, device: str = "cpu", size_bytes: int = READ_BYTES) -> float:
    """GB/s (1e9 bytes) at which this machine reads `size_bytes` of memory with `threads` threads: the best of ROUNDS rounds.

    By the kernels, each thread its own stretch; where there are none, by three reductions of PyTorch that touch every byte once:
    sums of float32 and of int64, and a bfloat16 matrix times a vector.  The best and not the middle, since it stands for a limit.
    """
    import torch

    from weft.models.memory import host_memory

    memory = host_memory(size_bytes, torch.device(device)).view(torch.int64).fill_(1)  # in such pages as weights have
    module = native.module()
    if module is not None and device == "cpu":
        program = module.Program(threads)
        return memory.nbytes / fastest(lambda: program.read(memory.data_ptr(), memory.nbytes), device) / 1e9
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        matrix = memory.view(torch.bfloat16).view(-1, ROW)
        vector = torch.ones(ROW, dtype=torch.bfloat16, device=device)
        kernels: list[Callable[[], Any]] = [
            memory.view(torch.float32).sum,
            memory.sum,
            lambda: matrix.mv(vector),
        ]
        return max(memory.nbytes / fastest(kernel, device) / 1e9 for kernel in kernels)
    finally:
        torch.set_num_threads(before)


def fastest(kernel: Callable[[], Any], device: str = "cpu", rounds: int = ROUNDS) -> float:
    """Seconds of the fastest of `rounds` calls, after one that is not counted."""
    import torch

    best = math.inf
    for turn in range(rounds + 1):
        began = time.perf_counter()
        kernel()
        if device != "cpu":
            torch.cuda.synchronize(device)
        if turn:
            best = min(best, time.perf_counter() - began)
    return best
