"""The header of a GGUF file: metadata, and the type, shape and place of each tensor.  No torch here.

    "GGUF"  version u32  tensors u64  keys u64
    keys x  (name string, type u32, value)          string: bytes u64, UTF-8       array: type u32, count u64, values
    tensors x  (name string, dims u32, dim u64 x dims, fastest first, type u32, offset u64)
    padding to general.alignment, then the data; offsets count from there

Every number in the file is taken for a lie until it has been compared with the bytes that are there: Python's integers do not
wrap, counts are bounded before anything is made of them, and tensors must lie inside the file, aligned, apart from each other.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import ConfigError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 256 << 20
"""Headers of models with vocabularies of 250,000 tokens have about 15 MB."""
MAX_KEYS = 1 << 14
MAX_TENSORS = 1 << 17
MAX_ITEMS = 1 << 22
"""Values of all arrays together."""
MAX_KEY_BYTES = (1 << 16) - 1
MAX_NAME_BYTES = 64
MAX_STRING_BYTES = 16 << 20
MAX_DIMS = 4
MAX_DEPTH = 3
"""Arrays in arrays."""
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values, as `struct` names them."""
BOOL, STRING, ARRAY = 7, 8, 9
LEAST_BYTES = {**{kind: struct.calcsize("<" + code) for kind, code in SCALARS.items()}, STRING: 8, ARRAY: 12}


@dataclass(frozen=True, slots=True)
class TensorType:
    """How values are stored: blocks of `values` values in `bytes` bytes."""

    name: str
    values: int
    bytes: int


TYPES = {
    code: TensorType(name, values, size)
    for code, name, values, size in (
        (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 40), (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4), (27, "I64", 1, 8), (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56), (30, "BF16", 1, 2), (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17),
    )
}  # fmt: skip
"""Types by their number in a file, those that weft cannot read too: their sizes are checked, and errors name them."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor: shape with the slowest dimension first, as torch has it, and bytes [start, stop) of the file."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """metadata: values by key; arrays are tuples.  tensors: by name, in the order of the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Entry]


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file (by its ending; what is in it is looked at when it is read)."""
    return path.suffix == ".gguf" and path.is_file()


def read(path: Path) -> Header:
    """The header of a file.  Raises ConfigError that says what is wrong with it."""
    try:
        with open(path, "rb") as handle:
            size = handle.seek(0, 2)
            if size < 24:
                raise ConfigError(f"{path} has {size} bytes, fewer than a GGUF header; fetch it again")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _Reader(path, mapped).header()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error})") from None


class _Reader:
    """Reads forward through the bytes of a file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.end = min(self.size, MAX_HEADER_BYTES)
        self.at = 0
        self.items = 0

    def refuse(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path}: {what}")

    def need(self, count: int, what: str) -> int:
        """Where the next `count` bytes start; they are taken."""
        start = self.at
        if count > self.end - start:
            if self.end < self.size:
                raise self.refuse(
                    f"the header goes on for more than {MAX_HEADER_BYTES} bytes, which no model needs ({what})"
                )
            raise self.refuse(f"the file ends inside {what}: it is damaged or was not fetched whole; fetch it again")
        self.at = start + count
        return start

    def number(self, code: str, what: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.need(struct.calcsize("<" + code), what))[0]

    def count(self, most: int, what: str) -> int:
        """A count that must not exceed `most`."""
        value: int = self.number("Q", what)
        if value > most:
            raise self.refuse(f"{what} is {value}; at most {most} are read")
        return value

    def string(self, most: int, what: str) -> str:
        size = self.count(most, f"the length of {what}")
        start = self.need(size, what)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            raise self.refuse(f"{what} is not UTF-8 text") from None

    def header(self) -> Header:
        if self.data[:4] != MAGIC:
            raise self.refuse("this is no GGUF file: it does not begin with 'GGUF'")
        self.at = 4
        version = self.number("I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (*VERSIONS, 1)
            reason = "it is big-endian" if swapped else f"it has version {version}"
            raise self.refuse(f"{reason}; weft reads little-endian GGUF of version 2 or 3: convert the model again")
        tensors = self.count(MAX_TENSORS, "the number of tensors")
        keys = self.count(MAX_KEYS, "the number of metadata keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.string(MAX_KEY_BYTES, "a metadata key")
            if not key or not key.isascii():
                raise self.refuse(f"the metadata key {key[:60]!r} is not ASCII text")
            if key in metadata:
                raise self.refuse(f"the metadata key {key[:60]!r} stands there twice")
            metadata[key] = self.value(self.number("I", f"the type of {key[:60]}"), key[:60], 0)
        alignment = self.alignment(metadata)
        found = [self.tensor() for _ in range(tensors)]
        return Header(self.path, metadata, self.placed(found, -(-self.at // alignment) * alignment, alignment))

    def alignment(self, metadata: dict[str, Any]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(value) is not int or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise self.refuse(f"general.alignment is {str(value)[:40]}; expected a power of two up to {MAX_ALIGNMENT}")
        return value

    def value(self, kind: int, key: str, depth: int) -> Any:
        if kind == STRING:
            return self.string(MAX_STRING_BYTES, key)
        if kind == ARRAY:
            return self.array(key, depth + 1)
        if kind not in SCALARS:
            raise self.refuse(f"{key} has the unknown type {kind}")
        return self.scalars(kind, 1, key)[0]

    def scalars(self, kind: int, count: int, key: str) -> tuple[Any, ...]:
        start = self.need(count * LEAST_BYTES[kind], key)
        if kind == BOOL and any(byte > 1 for byte in self.data[start : start + count]):
            raise self.refuse(f"{key} holds a truth value that is neither 0 nor 1")
        return struct.unpack_from(f"<{count}{SCALARS[kind]}", self.data, start)

    def array(self, key: str, depth: int) -> tuple[Any, ...]:
        if depth > MAX_DEPTH:
            raise self.refuse(f"{key} has arrays nested more than {MAX_DEPTH} deep")
        kind = self.number("I", f"the type of {key}")
        if kind not in LEAST_BYTES:
            raise self.refuse(f"{key} is an array of the unknown type {kind}")
        count: int = self.number("Q", f"the number of values of {key}")
        self.items += count
        if self.items > MAX_ITEMS:
            raise self.refuse(f"{key} brings the metadata to more than {MAX_ITEMS} values, which no model needs")
        if count * LEAST_BYTES[kind] > self.end - self.at:
            self.need(count * LEAST_BYTES[kind], key)
        if kind in SCALARS:
            return self.scalars(kind, count, key)
        if kind == STRING:
            return self.strings(count, key)
        return tuple([self.array(key, depth + 1) for _ in range(count)])

    def strings(self, count: int, key: str) -> tuple[str, ...]:
        """`string`, many times over: vocabularies have hundreds of thousands."""
        data, end, size_at, at = self.data, self.end, struct.Struct("<Q").unpack_from, self.at
        found = []
        try:
            for _ in range(count):
                size = size_at(data, at)[0] if at + 8 <= end else MAX_STRING_BYTES + 1
                stop = at + 8 + size
                if size > MAX_STRING_BYTES or stop > end:
                    break
                found.append(data[at + 8 : stop].decode("utf-8"))
                at = stop
        except UnicodeDecodeError:
            raise self.refuse(f"string {len(found)} of {key} is not UTF-8 text") from None
        self.at = at
        if len(found) < count:  # this says what is wrong with the next one
            self.string(MAX_STRING_BYTES, f"string {len(found)} of {key}")
        return tuple(found)

    def tensor(self) -> tuple[str, TensorType, tuple[int, ...], int]:
        """(name, type, shape, offset), the size not yet compared with anything."""
        name = self.string(MAX_NAME_BYTES, "a tensor's name")
        dims = self.number("I", f"the dimensions of {name}")
        if not 1 <= dims <= MAX_DIMS:
            raise self.refuse(f"the tensor {name!r} has {dims} dimensions; expected 1 to {MAX_DIMS}")
        shape = tuple(self.number("Q", f"the shape of {name}") for _ in range(dims))
        code = self.number("I", f"the type of {name}")
        if code not in TYPES:
            raise self.refuse(f"the tensor {name!r} has the unknown type {code}")
        kind = TYPES[code]
        if 0 in shape:
            raise self.refuse(f"the tensor {name!r} has a dimension of 0")
        if shape[0] % kind.values:
            raise self.refuse(
                f"rows of {name!r} have {shape[0]} values, and {kind.name} stores {kind.values} at a time"
            )
        return name, kind, shape[::-1], self.number("Q", f"the place of {name}")

    def placed(
        self, found: Iterable[tuple[str, TensorType, tuple[int, ...], int]], base: int, alignment: int
    ) -> dict[str, Entry]:
        """Each tensor where it lies: inside the file, aligned, under a name of its own, apart from all others."""
        tensors: dict[str, Entry] = {}
        for name, kind, shape, offset in found:
            if name in tensors:
                raise self.refuse(f"two tensors are called {name!r}")
            if offset % alignment:
                raise self.refuse(f"the tensor {name!r} begins at {offset}, which is no multiple of {alignment}")
            size = kind.bytes
            for dim in shape:
                size *= dim
            size //= kind.values
            if base + offset + size > self.size:
                raise self.refuse(
                    f"the tensor {name!r} ends at byte {base + offset + size} of a file of {self.size}: "
                    "it is damaged or was not fetched whole; fetch it again"
                )
            tensors[name] = Entry(name, kind, shape, base + offset, base + offset + size)
        last = None
        for entry in sorted(tensors.values(), key=lambda entry: entry.start):
            if last is not None and entry.start < last.stop:
                raise self.refuse(f"the tensors {last.name!r} and {entry.name!r} overlap")
            last = entry
        return tensors
