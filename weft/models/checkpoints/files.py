"""The tensors of a checkpoint over its mapped files, and the pages given back when they have been read."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from weft.models.checkpoints.stored import Stored


class Files:
    """Reads tensors by name.  Each file is mapped when it is first read, and let go at the end of the `with`."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored = stored
        self._maps: dict[Path, mmap.mmap] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._maps.clear()  # a tensor that somebody still holds keeps its map alive

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with open(file, "rb") as handle:  # a map holds the file by itself
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]

    def get(self, name: str) -> Tensor:
        """The tensor over the mapped bytes, to be read only; a copy where the file does not align its values."""
        where = self.stored[name]
        mapped = self._map(where.file)
        count = math.prod(where.shape)
        if count == 0:
            return torch.empty(where.shape, dtype=where.dtype)
        if where.start % where.dtype.itemsize:
            return torch.frombuffer(bytearray(mapped[where.start : where.stop]), dtype=where.dtype).view(where.shape)
        return torch.frombuffer(mapped, dtype=where.dtype, count=count, offset=where.start).view(where.shape)

    def bytes(self, name: str, start: int, stop: int) -> Tensor:
        """Bytes [start, stop) of a tensor, uint8; a copy where they do not begin at a multiple of 8, as views of them must."""
        where = self.stored[name]
        raw = torch.frombuffer(self._map(where.file), dtype=torch.uint8, count=stop - start, offset=where.start + start)
        return raw if (where.start + start) % 8 == 0 else raw.clone()

    def give_back(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Let the kernel take the pages of a tensor, or of bytes [start, stop) of it, that have been read."""
        where = self.stored[name]
        first, last = where.start + start, where.stop if stop is None else where.start + stop
        if hasattr(mmap, "MADV_DONTNEED") and where.file in self._maps and last > first:
            page = first // mmap.PAGESIZE * mmap.PAGESIZE
            self._maps[where.file].madvise(mmap.MADV_DONTNEED, page, last - page)
