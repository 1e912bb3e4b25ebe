"""Checkpoints written tensor by tensor: weights of few bits as compressed-tensors packs them, the rest as it was.

The layout is `pack-quantized` (compressed-tensors 0.20.0; see `weft.models.checkpoints.unpack`).  Scales are float16 where that
is exact, else float32, so that a checkpoint read back is what was rounded, to the last bit.

Legend.  N: outputs.  K: inputs.  G: groups of K.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from weft.convert.awq import Changes
from weft.errors import ConfigError
from weft.models import load_config
from weft.models.checkpoints.files import Files
from weft.models.checkpoints.readers import readers
from weft.models.checkpoints.scheme import NESTED, SCALES
from weft.models.checkpoints.stored import INDEX, SINGLE, Stored, catalogue, compare
from weft.models.checkpoints.unpack import packed
from weft.models.families import families, read
from weft.models.formats import WeightFormat
from weft.models.gguf.header import is_gguf
from weft.models.layout import Part, quantized
from weft.models.spec import DecoderSpec

Progress = Callable[[int, int], None]

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int64: "I64",
}
ENTRY_BYTES = 160
"""Room for a tensor in a file's header, beside its name."""
CHUNK = 1 << 22
"""Weights that are rounded at once."""


@dataclass(frozen=True, slots=True)
class Written:
    """rounded, kept: tensors in few bits and as they were.  bytes_before, bytes_after: of all tensors."""

    rounded: int
    kept: int
    bytes_before: int
    bytes_after: int

    def as_json(self) -> dict[str, int]:
        return asdict(self)


class Writer:
    """A safetensors file whose tensors come one after the other; its header is filled in at the end."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._room = -(-(sum(len(json.dumps(name)) + ENTRY_BYTES for name in names) + 256) // 8) * 8
        self._file = open(path, "xb")  # noqa: SIM115 - closed by __exit__
        self._file.write(bytes(8 + self._room))
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.size = 0

    def __enter__(self) -> Writer:
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        data = tensor.contiguous().flatten().view(torch.uint8).numpy()
        span = [self.size, self.size + data.nbytes]
        self._entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        self._file.write(data.data)
        self.size = span[1]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                header = json.dumps(self._entries, separators=(",", ":")).encode().ljust(self._room)
                assert len(header) == self._room
                self._file.seek(0)
                self._file.write(self._room.to_bytes(8, "little") + header)
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that can be converted.  few: the fused weights that are rounded.  parts: in the order of the files."""

    config: dict[str, Any]
    spec: DecoderSpec
    stored: Mapping[str, Stored]
    parts: Sequence[Part]
    few: Mapping[str, WeightFormat]


def source_of(folder: Path, form: WeightFormat) -> Source:
    """What is to be converted, by its headers alone.

    Raises ConfigError for a checkpoint that cannot be read, is quantized, or whose rows the groups don't divide.
    """
    if is_gguf(folder):
        raise ConfigError(f"{folder} is a GGUF file; weft convert takes a folder with config.json and safetensors")
    config = load_config(folder)
    spec = read(config)
    if config.get("quantization_config"):
        raise ConfigError(
            f"{folder} is quantized already (quantization_config); convert the checkpoint that it came from"
        )
    stored = catalogue(folder)
    parts = list(families()[spec.family].parts(spec))
    compare(folder, parts, stored, spec)
    readers(folder, parts, stored, None)
    few = quantized(spec, form)
    for part in parts:
        if part.target in few and part.shape[1] % (form.group or part.shape[1]):
            raise ConfigError(
                f"{part.name} has rows of {part.shape[1]} inputs, which {form} cannot part; choose another group"
            )
    parts.sort(key=lambda part: (str(stored[part.name].file), stored[part.name].start))
    return Source(config, spec, stored, parts, few)


def convert(
    folder: Path, out: Path, form: WeightFormat, changes: Changes | None = None, progress: Progress | None = None
) -> Written:
    """Write the tensors and config.json of `folder`, its matrices in `form`, into the empty folder `out`.

    Embedding, head and experts are matrices; routers, norms and biases stay as they are.  Memory: one tensor.
    Raises ConfigError as `source_of` does.
    """
    changes = changes or Changes()
    source = source_of(folder, form)
    config, stored, parts, few = source.config, source.stored, source.parts, source.few
    total = sum(stored[part.name].stop - stored[part.name].start for part in parts)
    places: dict[str, str] = {}
    done = after = 0
    with Files(stored) as files:
        for file, mine in _by_file(parts, stored):
            names = [name for part in mine for name in (_tails(part, form) if part.target in few else [part.name])]
            with Writer(out / file.name, names) as writer:
                for part in mine:
                    _write(writer, part, files.get(part.name), form if part.target in few else None, changes)
                    files.give_back(part.name)
                    done += stored[part.name].stop - stored[part.name].start
                    if progress is not None:
                        progress(done, total)
            places |= dict.fromkeys(names, file.name)
            after += writer.size
    _index(out, places, after)
    config["quantization_config"] = entry(form, parts, few, source.spec.tied)
    config.pop(SCALES, None)
    if form.nested:
        config[SCALES] = NESTED
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")
    rounded = sum(part.target in few for part in parts)
    return Written(rounded, len(parts) - rounded, total, after)


def entry(form: WeightFormat, parts: Sequence[Part], few: Mapping[str, WeightFormat], tied: bool) -> dict[str, Any]:
    """`quantization_config` of a checkpoint whose fused weights `few` are in `form`."""
    dense = [part.name.removesuffix(".weight") for part in parts if len(part.shape) == 2 and part.target not in few] + (
        ["lm_head"] if tied else []
    )
    weights = {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": form.symmetric,
        "strategy": "group" if form.group else "channel",
        "group_size": form.group or None,
        "dynamic": False,
    }
    group = {"targets": ["Linear", "Embedding"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "output_activations": None, "format": "pack-quantized"}},
        "ignore": dense,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _by_file(parts: Sequence[Part], stored: Mapping[str, Stored]) -> Iterator[tuple[Path, list[Part]]]:
    found: dict[Path, list[Part]] = {}
    for part in parts:
        found.setdefault(stored[part.name].file, []).append(part)
    yield from found.items()


def _tails(part: Part, form: WeightFormat) -> list[str]:
    tails = ["packed", "scale", "shape", *([] if form.symmetric else ["zero_point"])]
    return [f"{part.name}_{tail}" for tail in tails]


def _write(writer: Writer, part: Part, tensor: Tensor, form: WeightFormat | None, changes: Changes) -> None:
    if form is None:
        writer.add(part.name, changes.applied(part, tensor).to(tensor.dtype))
        return
    words, scales, zeros = [], [], []
    step = max(1, CHUNK // part.shape[1])
    for first in range(0, part.shape[0], step):
        rows = tensor[first : first + step]
        if not bool(torch.isfinite(rows).all()):
            raise ConfigError(f"{part.name} has values that are not finite, which no format of few bits holds")
        grid = changes.rounded(part, rows, form, first)
        words.append(packed(grid.values, form.bits))
        scales.append(grid.steps())
        zero = grid.zeros()
        if zero is not None:
            zeros.append(zero)
    writer.add(f"{part.name}_packed", torch.cat(words))
    writer.add(f"{part.name}_scale", _narrow(torch.cat(scales)))
    writer.add(f"{part.name}_shape", torch.tensor(part.shape))
    if zeros:
        writer.add(f"{part.name}_zero_point", packed(torch.cat(zeros).t().contiguous(), form.bits).t())


def _narrow(scales: Tensor) -> Tensor:
    half = scales.to(torch.float16)
    return half if torch.equal(half.float(), scales) else scales


def _index(out: Path, places: Mapping[str, str], size: int) -> None:
    """The index of a checkpoint of several files, or of one that loaders would not look for."""
    if set(places.values()) == {SINGLE}:
        return
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf8")
