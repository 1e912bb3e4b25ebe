"""Weights: safetensors or GGUF read straight into one arena of fused tensors, or drawn at random.

The checkpoint's files are mapped, some rows of a tensor after the other are copied (and converted) to where the operations read
them, and their pages are given back: the weights exist once, and loading peaks at their size and a window of rows.  Tensors of
few bits in safetensors are read whole.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.errors import ConfigError
from weft.models.checkpoints.files import Files
from weft.models.checkpoints.readers import opened
from weft.models.layout import Part, arena, stored_bytes, tensor_shapes
from weft.models.memory import host_memory
from weft.models.quantized import Quantized, WeightFormat, quantize
from weft.models.spec import DecoderSpec
from weft.ops.cpu.panels import Panels, Stacked

if TYPE_CHECKING:
    from weft.models.kernels import Native

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

NOISE = 1 << 22
"""Values in the block of noise that random weights are cut from."""

Weights = dict[str, Any]
"""Fused tensors by name; where the kernels compute, the matrices among them are `Panels`."""


def allocate(
    spec: DecoderSpec,
    dtype: torch.dtype,
    device: torch.device,
    native: Native | None = None,
    formats: Mapping[str, WeightFormat] | None = None,
) -> tuple[Tensor, Weights]:
    """(arena, fused tensors by name), zeros: where an output is missing from its panel, they stand for it.

    The arena has exactly `weights_bytes` bytes.

    native: the kernels that will read the matrices, which are panels then, each in its format if it has one.
    """
    kind, formats = str(dtype).removeprefix("torch."), formats or {}
    sizes = stored_bytes(spec, kind, native is not None, formats)
    offsets, total = arena(sizes)
    memory = host_memory(total, device)
    views: Weights = {}
    for name, shape in tensor_shapes(spec).items():
        mine = memory[offsets[name] : offsets[name] + sizes[name]]
        if native is not None and len(shape) > 1:
            made = partial(Panels, format=formats.get(name, dtype), program=native.program, module=native.module)
            each = mine.split(mine.numel() // math.prod(shape[:-2]))
            parts = tuple(made(part, (shape[-2], shape[-1])) for part in each)
            views[name] = parts[0] if len(shape) == 2 else Stacked(parts)
        else:
            views[name] = mine.view(dtype).view(shape)
    return memory, views


def load(
    folder: Path,
    spec: DecoderSpec,
    tensors: Weights,
    progress: Progress | None = None,
    formats: Mapping[str, WeightFormat] | None = None,
) -> None:
    """Fill the fused tensors from the folder's safetensors, or from a GGUF file, rounded to their formats.

    Raises ConfigError when a tensor is missing, unexpected or of another shape (each is named), when a file is missing,
    truncated or malformed, or when there are only pickle files; for a head of fewer rows, which is cut from a whole one.
    """
    if spec.kept:
        raise ConfigError(
            "a head of some rows is cut from a decoder that is there (models.trimmed), and is in no checkpoint"
        )
    source = opened(folder, spec)
    done, total = 0, source.size
    with Files(source.stored) as files:
        for reader in source.readers:
            for piece, values, size in reader.pieces(files):
                _fill(tensors[piece.target], piece, values, (formats or {}).get(piece.target))
                done += size
                if progress is not None:
                    progress(done, total)


def randomize(
    spec: DecoderSpec,
    tensors: Weights,
    seed: int = 0,
    progress: Progress | None = None,
    formats: Mapping[str, WeightFormat] | None = None,
) -> None:
    """Fill the fused tensors with noise that depends on (seed, name): rows of matrices have length about 1, norms are 1.

    Such a model computes with numbers of ordinary size, and the same seed gives the same model in each process.  Large
    tensors are pieced together from stretches of one block of noise, which is many times faster than drawing them.
    """
    dtype, device = tensors["norm"].dtype, tensors["norm"].device
    block = torch.randn(NOISE, generator=torch.Generator().manual_seed(seed)).to(device)
    total = sum(tensor.nbytes for tensor in tensors.values())
    done = 0
    for name, tensor in tensors.items():
        if len(tensor.shape) == 1 and not name.endswith("bias"):
            tensor.fill_(1.0 - spec.norm_offset)
        elif isinstance(tensor, Panels | Stacked):
            parts = tensor.parts if isinstance(tensor, Stacked) else (tensor,)
            outs, width = parts[0].shape
            step = max(1, NOISE // 2 // width)
            for index, part in enumerate(parts):
                for first in range(0, outs, step):
                    some = torch.empty(min(step, outs - first), width, dtype=dtype)
                    _noise(some.view(-1), (index * outs + first) * width, f"{seed}/{name}", block, width**-0.5)
                    part.pack(some, first)
        else:
            _noise(tensor.view(-1), 0, f"{seed}/{name}", block, tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.02)
            if formats and name in formats:
                for matrix in tensor if tensor.dim() == 3 else [tensor]:
                    _round(matrix, formats[name])
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)


def dense(weight: Any) -> Tensor:
    """A fused weight as a plain tensor, to look at: a copy where it is stored otherwise."""
    return weight.unpacked() if isinstance(weight, Panels | Stacked) else weight


def _noise(out: Tensor, start: int, key: str, block: Tensor, scale: float) -> None:
    """Values [start, start + len(out)) of a tensor that is pieced together from stretches of the block."""
    size = NOISE // 2
    stop = start + out.numel()
    for index in range(start // size, -(-stop // size)):
        digest = hashlib.blake2b(f"{key}/{index}".encode(), digest_size=8).digest()
        begin = int.from_bytes(digest, "little") % size
        first, last = max(start, index * size), min(stop, (index + 1) * size)
        part = block[begin + first - index * size : begin + last - index * size]
        torch.mul(part, scale, out=out[first - start : last - start])


def _round(matrix: Tensor, format: WeightFormat) -> None:
    """Put in the place of a dense weight what the format keeps of it."""
    step = max(1, NOISE // matrix.shape[1])
    for rows in matrix.split(step):
        rows.copy_(quantize(rows, format).dequantized())


def _fill(target: Any, part: Part, source: Tensor | Quantized, format: WeightFormat | None) -> None:
    """Put a part of a fused tensor where it belongs; a dense one keeps what the format would keep."""
    if isinstance(target, Stacked):
        assert part.expert is not None
        target = target.parts[part.expert]
    if isinstance(target, Panels):
        if isinstance(source, Quantized) and not target.holds(source.format):
            source = source.dequantized()  # what was asked for holds less, so that it is rounded again
        target.pack(source, part.first)
        return
    place = _place(target, part)
    if isinstance(source, Quantized) and format == source.format:
        format = None  # as it is
    dense = source.dequantized() if isinstance(source, Quantized) else source
    place.copy_(dense)
    if format is not None:
        for first in range(0, len(place), step := max(1, NOISE // place.shape[1])):
            rows = slice(first, first + step)
            place[rows] = quantize(dense[rows], format).dequantized()


def _place(target: Tensor, part: Part) -> Tensor:
    """The view of a fused tensor that a part fills."""
    view = target if part.expert is None else target[part.expert]
    return view[part.first : part.first + part.shape[0]]
