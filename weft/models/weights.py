"""Weights: safetensors or GGUF read straight into one arena of fused tensors, or drawn at random.

The checkpoint's files are mapped, each tensor is copied (and converted) to where the operations read it, and its pages are
given back: the weights exist once, and loading peaks at their size plus one tensor's pages.  Quantized tensors of GGUF become
numbers a few rows at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weft.errors import ConfigError
from weft.models.families import families
from weft.models.gguf import blocks
from weft.models.gguf.checkpoint import catalogue
from weft.models.gguf.header import is_gguf
from weft.models.layout import Part, arena, stored_bytes, tensor_shapes
from weft.models.quantized import WeightFormat, quantize
from weft.models.spec import DecoderSpec
from weft.ops.cpu.panels import Panels, Stacked

if TYPE_CHECKING:
    from weft.ops.cpu.operations import Native

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
PACKED_DTYPES = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
"""What weights of few bits are stored in (`weft.models.checkpoints`)."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX_BYTES = 256 << 20
ALIGN = 8
"""Bytes of the widest number that a view of a quantized tensor's bytes may be."""
NOISE = 1 << 22
"""Values in the block of noise that random weights are cut from."""
WINDOW = 1 << 20
"""Values that are made of quantized ones at a time."""
NAMED_AT_MOST = 6
"""Names that an error lists."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies in a checkpoint file: bytes [start, stop) of `file`.

    type, pairs: how GGUF stores values, and rows (see `weft.models.gguf`); dtype is uint8 then unless they are plain numbers.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    type: str = ""
    pairs: int = 0


Weights = dict[str, Any]
"""Fused tensors by name; where the kernels compute, the matrices among them are `Panels`."""


def allocate(
    spec: DecoderSpec,
    dtype: torch.dtype,
    device: torch.device,
    native: Native | None = None,
    formats: Mapping[str, WeightFormat] | None = None,
) -> tuple[Tensor, Weights]:
    """(arena, fused tensors by name), uninitialized; the arena has exactly `weights_bytes` bytes.

    native: the kernels that will read the matrices, which are panels then, each in its format if it has one.
    """
    kind, formats = str(dtype).removeprefix("torch."), formats or {}
    sizes = stored_bytes(spec, kind, native is not None, formats)
    offsets, total = arena(sizes)
    # Where an output is missing from its panel, zeros stand for it.
    memory = (torch.empty if native is None else torch.zeros)(total, dtype=torch.uint8, device=device)
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
    truncated or malformed, or when there are only pickle files.
    """
    stored = _catalogue(folder)
    parts = list(families()[spec.family].parts(spec))
    _compare(folder, parts, stored, spec)
    parts.sort(key=lambda part: (str(stored[part.name].file), stored[part.name].start))
    total = sum(stored[part.name].stop - stored[part.name].start for part in parts)
    done = 0
    for file, mine in _by_file(parts, stored):
        with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            for part in mine:
                where = stored[part.name]
                for piece, source, place in _pieces(mapped, part, where):
                    _fill(tensors[part.target], piece, source, (formats or {}).get(part.target))
                    _give_back(mapped, place)
                    done += place.stop - place.start
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


def _fill(target: Any, part: Part, source: Tensor, format: WeightFormat | None) -> None:
    """Put a part of a fused tensor where it belongs."""
    if isinstance(target, Stacked):
        assert part.expert is not None
        target = target.parts[part.expert]
    if isinstance(target, Panels):
        target.pack(source, part.first)
        return
    place = _place(target, part)
    place.copy_(source)
    if format is not None:
        place.copy_(quantize(source, format).dequantized())


def _place(target: Tensor, part: Part) -> Tensor:
    """The view of a fused tensor that a part fills."""
    view = target if part.expert is None else target[part.expert]
    return view[part.first : part.first + part.shape[0]]


def _by_file(parts: Sequence[Part], stored: dict[str, Stored]) -> Iterator[tuple[Path, list[Part]]]:
    files: dict[Path, list[Part]] = {}
    for part in parts:
        files.setdefault(stored[part.name].file, []).append(part)
    yield from files.items()


def _pieces(mapped: mmap.mmap, part: Part, where: Stored) -> Iterator[tuple[Part, Tensor, Stored]]:
    """A tensor, whole or some of its rows after the other: (what it fills, its values, where they lie)."""
    if not where.pairs and where.dtype is not torch.uint8:
        yield part, _read(mapped, where), where
        return
    size = (where.stop - where.start) // where.shape[0]
    for first, last in blocks.windows(where.shape, WINDOW, max(1, where.pairs)):
        shape = (last - first, *where.shape[1:])
        place = replace(
            where, dtype=torch.uint8, shape=((last - first) * size,),
            start=where.start + first * size, stop=where.start + last * size,
        )  # fmt: skip
        raw = _read(mapped, place)
        values = blocks.dequantized(raw if place.start % ALIGN == 0 else raw.clone(), where.type, shape)
        if where.pairs:
            values = blocks.unpaired(values, where.pairs)
        yield replace(part, first=part.first + first, shape=shape), values, place


def _read(mapped: mmap.mmap, where: Stored) -> Tensor:
    """A tensor over mapped bytes, without copying; through a copy where the file does not align its values."""
    count = math.prod(where.shape)
    if where.start % where.dtype.itemsize:
        return torch.frombuffer(bytearray(mapped[where.start : where.stop]), dtype=where.dtype).view(where.shape)
    return torch.frombuffer(mapped, dtype=where.dtype, count=count, offset=where.start).view(where.shape)


def _give_back(mapped: mmap.mmap, where: Stored) -> None:
    """Let the kernel take the pages of a tensor that has been copied."""
    if hasattr(mmap, "MADV_DONTNEED"):
        start = where.start // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, start, where.stop - start)


# ---------------------------------------------------------------------------------------------- the checkpoint's files


def _catalogue(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint, by name."""
    if is_gguf(folder):
        return {
            name: Stored(
                t.file, blocks.PLAIN.get(t.type.name, torch.uint8), t.shape, t.start, t.stop, t.type.name, t.pairs
            )
            for name, t in catalogue(folder).items()
        }
    index = folder / INDEX
    if index.is_file():
        return _sharded(folder, index)
    single = folder / SINGLE
    if single.is_file():
        return _header(single)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ConfigError(
            f"{folder} has weights only as pickle files, which can run code when opened and are never loaded; "
            "convert them to safetensors (transformers' save_pretrained does) or use a checkpoint that has them"
        )
    raise ConfigError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _sharded(folder: Path, index: Path) -> dict[str, Stored]:
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ConfigError(f"{index} has more than {MAX_INDEX_BYTES} bytes, which no index has")
        names: Any = json.loads(index.read_bytes()).get("weight_map")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{index} cannot be read as a JSON object: {error}") from None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ConfigError(f"{index}: weight_map must be an object of tensor and file names")
    shards: dict[str, dict[str, Stored]] = {}
    for file in sorted(set(names.values())):
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ConfigError(f"{index}: {file!r} is not the name of a safetensors file in the same folder")
        if not (folder / file).is_file():
            raise ConfigError(f"{folder / file}, which {INDEX} names, does not exist; fetch the checkpoint again")
        shards[file] = _header(folder / file)
    absent = [name for name, file in names.items() if name not in shards[file]]
    if absent:
        raise ConfigError(f"{index} places {_some(absent)} in files that do not have them")
    return {name: shards[file][name] for name, file in names.items()}


def _header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, after the library has checked that sizes, offsets and the file agree."""
    try:
        with safe_open(str(file), framework="numpy") as checked:
            names = list(checked.keys())
        with open(file, "rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not a whole safetensors file ({error}); fetch it again") from None
    found = {}
    for name in names:
        entry = header[name]
        start, stop = entry["data_offsets"]
        dtype = (SAFETENSORS_DTYPES | PACKED_DTYPES).get(entry["dtype"], torch.uint8)
        found[name] = Stored(file, dtype, tuple(entry["shape"]), 8 + size + start, 8 + size + stop)
    return found


def _compare(folder: Path, parts: Sequence[Part], stored: dict[str, Stored], spec: DecoderSpec) -> None:
    """Raise ConfigError unless the checkpoint has exactly the tensors that the config asks for."""
    wanted = {part.name: part for part in parts}
    gguf = is_gguf(folder)
    source = "metadata" if gguf else "config.json"
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise ConfigError(f"{folder} lacks {_some(missing)}, for which its {source} {'ask' if gguf else 'asks'}")
    allowed = re.compile(r"(.*\.)?rotary_emb\.inv_freq|blk\.\d+\.attn_rot_embd\.weight" + (r"|lm_head\.weight" if spec.tied else ""))
    extra = [name for name in stored if name not in wanted and not allowed.fullmatch(name)]
    if extra:
        raise ConfigError(f"{folder} has {_some(extra)}, of which its {source} {'say' if gguf else 'says'} nothing")
    wrong = [
        f"{part.name} {list(stored[part.name].shape)} instead of {list(part.shape)}"
        for part in parts
        if stored[part.name].shape != part.shape
    ]
    if wrong:
        raise ConfigError(f"{folder} and its {source} disagree about the shape of {_some(wrong)}")
    readable = blocks.READABLE if gguf else tuple(SAFETENSORS_DTYPES)
    odd = [
        f"{part.name}{' (' + type + ')' if type else ''}"
        for part in parts
        if stored[part.name].dtype is torch.uint8 and (type := stored[part.name].type) not in readable
    ]
    if odd:
        raise ConfigError(
            f"{folder} stores {_some(odd)} in a number format that weft can't read; it reads {', '.join(readable)}"
        )


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
