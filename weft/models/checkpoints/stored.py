"""Where the tensors of a checkpoint lie: safetensors, one file or several with an index, or GGUF."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from weft.errors import ConfigError
from weft.models.gguf import blocks
from weft.models.gguf import checkpoint as gguf
from weft.models.gguf.header import is_gguf
from weft.models.layout import Part
from weft.models.spec import DecoderSpec

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
PACKED_DTYPES = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
"""What weights of few bits are stored in (`weft.models.checkpoints`)."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX_BYTES = 256 << 20
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


def catalogue(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint, by name."""
    if is_gguf(folder):
        return {
            name: Stored(
                t.file, blocks.PLAIN.get(t.type.name, torch.uint8), t.shape, t.start, t.stop, t.type.name, t.pairs
            )
            for name, t in gguf.catalogue(folder).items()
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
        names: Any = json.loads(index.read_bytes(), object_pairs_hook=_once).get("weight_map")
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
        raise ConfigError(f"{index} places {some(absent)} in files that do not have them")
    return {name: shards[file][name] for name, file in names.items()}


def _header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, after the library has checked that sizes, offsets and the file agree."""
    try:
        with safe_open(str(file), framework="numpy") as checked:
            names = list(checked.keys())
        with open(file, "rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(size), object_pairs_hook=_once)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not a whole safetensors file ({error}); fetch it again") from None
    found = {}
    for name in names:
        entry = header[name]
        start, stop = entry["data_offsets"]
        dtype = (SAFETENSORS_DTYPES | PACKED_DTYPES).get(entry["dtype"], torch.uint8)
        found[name] = Stored(file, dtype, tuple(entry["shape"]), 8 + size + start, 8 + size + stop)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a header or an index.  Raises ValueError where a key stands there twice: readers differ in which one holds."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:100]!r} stands there twice")
        found[name] = value
    return found


def compare(folder: Path, parts: Sequence[Part], stored: dict[str, Stored], spec: DecoderSpec) -> None:
    """Raise ConfigError unless the checkpoint has exactly the tensors that the config asks for."""
    wanted = {part.name: part for part in parts}
    packed = is_gguf(folder)
    source = "metadata" if packed else "config.json"
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise ConfigError(f"{folder} lacks {some(missing)}, which its {source} {'ask' if packed else 'asks'} for")
    unexpected(folder, [name for name in stored if name not in wanted], spec)
    wrong = [
        f"{part.name} {list(stored[part.name].shape)} instead of {list(part.shape)}"
        for part in parts
        if stored[part.name].shape != part.shape
    ]
    if wrong:
        raise ConfigError(f"{folder} and its {source} disagree about the shape of {some(wrong)}")
    readable = blocks.READABLE if packed else tuple(SAFETENSORS_DTYPES)
    odd = [
        f"{part.name}{' (' + type + ')' if type else ''}"
        for part in parts
        if stored[part.name].dtype is torch.uint8 and (type := stored[part.name].type) not in readable
    ]
    if odd:
        raise ConfigError(
            f"{folder} stores {some(odd)} in a number format that weft can't read; it reads {', '.join(readable)}"
        )


def unexpected(folder: Path, names: Iterable[str], spec: DecoderSpec) -> None:
    """Raise ConfigError where tensors are left over that no model of the kind has."""
    tied = r"|lm_head\.weight" if spec.tied else ""
    allowed = re.compile(r"(.*\.)?rotary_emb\.inv_freq|blk\.\d+\.attn_rot_embd\.weight" + tied)
    extra = [name for name in names if not allowed.fullmatch(name)]
    if extra:
        source = "metadata say" if is_gguf(folder) else "config.json says"
        raise ConfigError(f"{folder} has {some(extra)}, of which its {source} nothing")


def some(names: Sequence[str]) -> str:
    more = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
