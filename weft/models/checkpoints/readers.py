"""How each part of a fused weight is read: which stored tensors it takes, checked for shape and type before any is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weft.errors import ConfigError
from weft.models import load_config
from weft.models.checkpoints import unpack
from weft.models.checkpoints.scheme import Scheme, scheme
from weft.models.checkpoints.stored import Stored, catalogue, compare, unexpected
from weft.models.families import families
from weft.models.gguf import blocks
from weft.models.gguf.header import is_gguf
from weft.models.layout import Part
from weft.models.quantized import Quantized, WeightFormat
from weft.models.spec import DecoderSpec

if TYPE_CHECKING:
    from weft.models.checkpoints.files import Files

WINDOW, DENSE_WINDOW = 1 << 20, 1 << 22
"""Values that are made of quantized ones at a time; of dense ones that are read at a time."""
Get = Callable[[str], Tensor]
Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads one part.  names: the stored tensors that it takes.  format: None where it is dense."""

    part: Part
    names: tuple[str, ...]
    format: WeightFormat | None
    decode: Callable[[Get], Tensor | Quantized]

    def pieces(self, files: Files) -> Iterator[tuple[Part, Tensor | Quantized, int]]:
        """(what it fills, its values, bytes of the files that they came from), whole or some rows after the other.

        The values last until the next are asked for; the pages that they came from are given back.
        """
        yield self.part, self.decode(files.get), self.size(files.stored)
        for name in self.names:
            files.give_back(name)

    def size(self, stored: Mapping[str, Stored]) -> int:
        """Bytes of the files that it reads."""
        return sum(stored[name].stop - stored[name].start for name in self.names)

    def read(self, get: Get) -> Tensor | Quantized:
        """The part, of `part.shape`; may be a view of what `get` gives.  Raises ConfigError where its values cannot be."""
        return self.decode(get)


@dataclass(frozen=True, slots=True)
class Dense(Reader):
    """Reads a tensor of plain numbers a few rows at a time: never more of its pages are resident than those of a window."""

    def pieces(self, files: Files) -> Iterator[tuple[Part, Tensor | Quantized, int]]:
        where, tensor = files.stored[self.part.name], files.get(self.part.name)
        row_bytes = (where.stop - where.start) // where.shape[0]
        for first, last in blocks.windows(where.shape, DENSE_WINDOW, 1):
            start, stop = first * row_bytes, last * row_bytes
            part = replace(self.part, first=self.part.first + first, shape=(last - first, *where.shape[1:]))
            yield part, tensor[first:last], stop - start
            files.give_back(self.part.name, start, stop)


@dataclass(frozen=True, slots=True)
class Rows(Dense):
    """Reads a tensor of GGUF a few rows at a time."""

    def pieces(self, files: Files) -> Iterator[tuple[Part, Tensor | Quantized, int]]:
        where = files.stored[self.part.name]
        if where.type in blocks.PLAIN and not where.pairs:
            yield from Dense.pieces(self, files)
            return
        row_bytes = (where.stop - where.start) // where.shape[0]
        for first, last in blocks.windows(where.shape, WINDOW, max(1, where.pairs)):
            shape, start, stop = (last - first, *where.shape[1:]), first * row_bytes, last * row_bytes
            raw = files.bytes(self.part.name, start, stop)
            values = self.values(raw, where, shape)
            yield replace(self.part, first=self.part.first + first, shape=shape), values, stop - start
            files.give_back(self.part.name, start, stop)

    def values(self, raw: Tensor, where: Stored, shape: Sizes) -> Tensor | Quantized:
        """Some rows, from their bytes."""
        if self.format is None:
            found = blocks.dequantized(raw, where.type, shape)
            return blocks.unpaired(found, where.pairs) if where.pairs else found
        few = blocks.quantized(raw, where.type, (shape[0], shape[1]))
        if not where.pairs:
            return few
        values, scales = (blocks.unpaired(x, where.pairs) for x in (few.values, few.scales))
        offsets = None if few.offsets is None else blocks.unpaired(few.offsets, where.pairs)
        return replace(few, values=values, scales=scales, offsets=offsets)


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint's weights: where its tensors lie, and the readers of all parts, in the order of the files."""

    stored: Mapping[str, Stored]
    readers: Sequence[Reader]

    @property
    def size(self) -> int:
        """Bytes that are read."""
        return sum(reader.size(self.stored) for reader in self.readers)

    @property
    def formats(self) -> dict[str, WeightFormat]:
        """Of the fused weights that are stored in few bits."""
        return fused({reader.part.name: reader for reader in self.readers})


def opened(folder: Path, spec: DecoderSpec) -> Source:
    """What a folder with safetensors, or a GGUF file, has of a model's weights.

    Raises ConfigError when a tensor is missing, unexpected or of another shape or type (each is named), when a file is missing,
    truncated or malformed, or when there are only pickle files.
    """
    stored = catalogue(folder)
    parts = list(families()[spec.family].parts(spec))
    if is_gguf(folder):
        compare(folder, parts, stored, spec)
        found: list[Reader] = [_rows(part, stored[part.name]) for part in parts]
    else:
        given = scheme(load_config(folder)) if (folder / "config.json").is_file() else None
        if given is None:
            compare(folder, parts, stored, spec)
        by_name = readers(folder, parts, stored, given)
        found = list(by_name.values())
        if given is not None:
            used = {name for reader in found for name in reader.names}
            unexpected(folder, [name for name in stored if name not in used], spec)
    found.sort(key=lambda reader: (str(stored[reader.names[0]].file), stored[reader.names[0]].start))
    return Source(stored, found)


def _rows(part: Part, where: Stored) -> Rows:
    few = where.type not in blocks.PLAIN and len(part.shape) == 2 and not part.target.endswith(".router")
    format = blocks.format_of(where.type) if few else None

    def decode(get: Get) -> Tensor:
        return get(part.name)

    return Rows(part, (part.name,), format, decode)


def readers(
    folder: Path, parts: Iterable[Part], stored: Mapping[str, Stored], scheme: Scheme | None
) -> dict[str, Reader]:
    """A reader for each part, by the part's name.

    What the files hold decides: a float tensor of the part's name is dense, packed tensors are `Quantized` in the format that
    the scheme gives.  Raises ConfigError where tensors are missing or of another shape or type, or contradict the scheme.
    """
    found: dict[str, Reader] = {}
    missing = []
    for part in parts:
        reader = _packed(folder, part, stored, scheme) if scheme is not None else None
        if reader is None:
            if part.name in stored:
                reader = _dense(folder, part, stored[part.name])
            else:
                missing.append(part.name)
                continue
        elif part.name not in reader.names and part.name in stored:
            raise ConfigError(
                f"{folder} has {part.name} both dense and packed; remove one of the two from the checkpoint"
            )
        found[part.name] = reader
    if missing:
        more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
        raise ConfigError(f"{folder} lacks {', '.join(missing[:6])}{more}, which its config.json asks for")
    return found


def fused(found: Mapping[str, Reader]) -> dict[str, WeightFormat]:
    """The smallest format that holds each fused weight exactly; weights with a dense part have none."""
    formats: dict[str, WeightFormat | None] = {}
    for reader in found.values():
        target, mine = reader.part.target, reader.format
        before = formats.setdefault(target, mine)
        formats[target] = None if before is None or mine is None else before.widest(mine)
    return {target: form for target, form in formats.items() if form is not None}


def _dense(folder: Path, part: Part, where: Stored) -> Reader:
    if where.shape != part.shape:
        raise ConfigError(
            f"{folder} and its config.json disagree about the shape of {part.name}: "
            f"{list(where.shape)} instead of {list(part.shape)}"
        )
    if not where.dtype.is_floating_point:
        raise ConfigError(f"{folder} stores {part.name} in a number format that weft can't read as a weight")
    return Dense(part, (part.name,), None, lambda get: get(part.name))


def _packed(folder: Path, part: Part, stored: Mapping[str, Stored], scheme: Scheme) -> Reader | None:
    """The reader of a part that is stored in few bits; None for any other."""
    if not part.name.endswith(".weight") or len(part.shape) != 2:
        return None
    module = part.name.removesuffix(".weight")
    whole = stored.get(part.name)
    octets = scheme.method == "compressed-tensors" and whole is not None and whole.dtype is torch.int8
    sign = {"compressed-tensors": "weight_packed"}.get(scheme.method, "qweight")
    if f"{module}.{sign}" not in stored and not octets:
        return None
    kind = "Embedding" if part.target == "embed" else "Linear"
    form = scheme.format(module, kind)
    if form is None:
        raise ConfigError(
            f"{folder} has {module} in few bits, though quantization_config leaves it as it is; "
            "correct its list of layers in config.json"
        )
    look = _Look(folder, module, part.shape, form, stored)
    if scheme.method == "awq":
        return _awq(part, look)
    if scheme.method == "gptq":
        return _gptq(part, look, scheme.v2)
    return _compressed(part, look, octets)


@dataclass(frozen=True, slots=True)
class _Look:
    """Checks the stored tensors of one module."""

    folder: Path
    module: str
    shape: Sizes
    form: WeightFormat
    stored: Mapping[str, Stored]

    def name(self, tail: str) -> str:
        return f"{self.module}.{tail}"

    def has(self, tail: str) -> bool:
        return self.name(tail) in self.stored

    def require(self, tail: str, shapes: Iterable[Sizes], kinds: tuple[torch.dtype, ...]) -> Sizes:
        """The stored shape, which is one of `shapes`."""
        name, shapes = self.name(tail), list(shapes)
        where = self.stored.get(name)
        if where is None:
            raise ConfigError(f"{self.folder} lacks {name}, which {self.module} in few bits needs")
        if where.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ConfigError(
                f"{self.folder} has {name} of shape {list(where.shape)}; its config.json asks for {wanted}"
            )
        if where.dtype not in kinds:
            raise ConfigError(f"{self.folder} has {name} in another number format than {_spoken(kinds)}")
        return where.shape

    def groups(self) -> list[int]:
        """Numbers of stored groups that the format can hold: a row's, or those that are whole multiples of its own."""
        count = self.form.groups(self.shape[1])
        return [count // each for each in range(1, count + 1) if count % each == 0]

    def words(self, values: int) -> int:
        """32-bit words that hold so many values.  Raises ConfigError where they don't fill them."""
        per_word = 32 // self.form.bits
        if values % per_word:
            raise ConfigError(
                f"{self.folder}: {self.module} is of shape {list(self.shape)}, which words of {per_word} values don't fill; "
                "leave this layer dense"
            )
        return values // per_word


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WORDS = (torch.int32,)


def _spoken(kinds: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(kind).removeprefix("torch.") for kind in kinds)


def _awq(part: Part, look: _Look) -> Reader:
    outs, width = part.shape
    columns = look.words(outs)
    look.require("qweight", [(width, columns)], WORDS)
    groups = look.require("scales", [(count, outs) for count in look.groups()], FLOATS)[0]
    look.require("qzeros", [(groups, columns)], WORDS)
    names = tuple(look.name(tail) for tail in ("qweight", "qzeros", "scales"))

    def decode(get: Get) -> Quantized:
        qweight, qzeros, scales = map(get, names)
        return unpack.awq(qweight, qzeros, scales, look.form, look.module)

    return Reader(part, names, look.form, decode)


def _gptq(part: Part, look: _Look, v2: bool) -> Reader:
    outs, width = part.shape
    look.require("qweight", [(look.words(width), outs)], WORDS)
    groups = look.require("scales", [(count, outs) for count in look.groups()], FLOATS)[0]
    look.require("qzeros", [(groups, look.words(outs))], WORDS)
    names = [look.name(tail) for tail in ("qweight", "qzeros", "scales")]
    ordered = look.has("g_idx")
    if ordered:
        look.require("g_idx", [(width,)], (torch.int32, torch.int64))
        names.append(look.name("g_idx"))

    def decode(get: Get) -> Quantized:
        qweight, qzeros, scales, *more = map(get, names)
        return unpack.gptq(qweight, qzeros, scales, more[0] if more else None, look.form, v2, look.module)

    return Reader(part, tuple(names), look.form, decode)


def _compressed(part: Part, look: _Look, octets: bool) -> Reader:
    outs, width = part.shape
    per_word = 32 // look.form.bits
    if look.has("weight_g_idx"):
        raise ConfigError(
            f"{look.folder} has {look.name('weight_g_idx')}: groups out of their order (act-order), which weft can't read; "
            "use a version of the checkpoint without actorder=group"
        )
    if octets:
        names = [look.name("weight")]
        look.require("weight", [part.shape], (torch.int8,))
    else:
        names = [look.name("weight_packed"), look.name("weight_shape")]
        look.require("weight_packed", [(outs, -(-width // per_word))], WORDS)
        look.require("weight_shape", [(2,)], (torch.int64, torch.int32))
    counts = look.groups()
    single = [(1,), (1, 1)] if counts[0] == 1 else []
    scale = look.require("weight_scale", [*((outs, count) for count in counts), *single], FLOATS)
    names.append(look.name("weight_scale"))
    zeros = look.has("weight_zero_point")
    if zeros:
        packed = () if scale in single else ((-(-outs // per_word), scale[-1]),)
        kind = look.stored[look.name("weight_zero_point")].dtype
        look.require("weight_zero_point", [scale] if kind is torch.int8 else packed, (torch.int8, torch.int32))
        names.append(look.name("weight_zero_point"))
    elif not look.form.symmetric:
        look.require("weight_zero_point", [], ())

    def decode(get: Get) -> Quantized:
        if not octets and get(look.name("weight_shape")).tolist() != list(part.shape):
            raise ConfigError(f"{look.name('weight_shape')} is not {list(part.shape)}, as config.json has it")
        zero = get(look.name("weight_zero_point")) if zeros else None
        return unpack.compressed(get(names[0]), get(look.name("weight_scale")), zero, look.form, width, look.module)

    return Reader(part, tuple(names), look.form, decode)
