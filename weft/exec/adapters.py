"""The adapters that are loaded: read from folders, bounded in number and bytes, and held while requests use them.

adapter = book.read("x", folder)     # any thread: files to tensors, nothing else changes
book.enter(adapter)                  # between two steps
book.drop("x")                       # refused while somebody uses it
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

from weft.errors import CapacityError, ConfigError, RequestError
from weft.models.checkpoints.stored import SAFETENSORS_DTYPES
from weft.models.families import families
from weft.registry import Part, lookup, names
from weft.slots import PRODUCTS, Site
from weft.types import Adapted

if TYPE_CHECKING:
    from weft.config import Stack
    from weft.core.engine import Engine
    from weft.models.decoder import Decoder
    from weft.models.spec import DecoderSpec

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 16 << 20
"""Room in a file of tensors for what is not tensors."""
MAX_DIMS = 8
SLOT = "adapt"


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter in memory (`slots.Adapter`).  technique: whose it is.  path: the folder that it came from, as it was given."""

    name: str
    technique: str
    path: str
    digest: bytes
    tensors: Mapping[tuple[int, str], tuple[Tensor, ...]]
    multiply: Callable[[Tensor, Tensor], Tensor]

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for group in self.tensors.values() for t in group)

    @property
    def part(self) -> str:
        """How a request asks for it."""
        return f"{SLOT}={self.technique}(name={self.name!r})"

    def told(self, id: int = 0) -> Adapted:
        """What the front is told of it, in answer to the command `id`."""
        return Adapted(id, self.name, self.part, self.digest.hex())


class AdapterBook:
    """decoder: of the target model, which the adapters change.  most, most_bytes: bounds on what is loaded at once."""

    def __init__(self, decoder: Decoder, *, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self._decoder = decoder
        self._sites = sites(decoder.spec)
        self._loaded: dict[str, Adapter] = {}
        self._engines: list[Engine] = []
        self._opens = False

    def serve(self, engine: Engine) -> None:
        """From now on requests of this engine use the adapters."""
        self._engines.append(engine)

    @contextmanager
    def folders(self) -> Iterator[None]:
        """While a server's own stack is attached: it may bring the folder of its adapter along."""
        self._opens = True
        try:
            yield
        finally:
            self._opens = False

    # ------------------------------------------------------------------ what is there

    def adapters(self) -> list[Adapter]:
        return list(self._loaded.values())

    @property
    def bytes(self) -> int:
        return sum(a.bytes for a in self._loaded.values())

    def find(self, name: str, path: str | None = None) -> Adapter:
        """The adapter of that name; from `path` where a stack of the server's own brings one along.  Raises ConfigError."""
        adapter = self._loaded.get(name)
        if path is not None and (adapter is None or adapter.path != path):
            if not self._opens:
                raise ConfigError(
                    "only the server's own stack gives the path of an adapter; a request names what is loaded"
                )
            adapter = self.enter(self.read(name, path))
        if adapter is None:
            there = ", ".join(map(repr, self._loaded)) or "none"
            raise ConfigError(f"no adapter {name!r} is loaded; there is {there}")
        return adapter

    def users(self, name: str) -> int:
        """Live requests that compute with the adapter, and the server itself where its stack does."""
        adapter = self._loaded.get(name)
        if adapter is None:
            return 0
        stacks = [s for e in self._engines for s in (e.stacks.base, *(r.stack for r in e.requests()))]
        return sum(_adapter_of(stack) is adapter for stack in stacks)

    # ------------------------------------------------------------------ changes

    def read(self, name: str, path: str, *, root: str | None = None, technique: str | None = None) -> Adapter:
        """Read a folder and put the tensors where the decoder wants them; the book stays as it is.

        root: the folder outside of which nothing is opened, symbolic links included.  technique: which of the slot reads it;
        the one that the files name (`peft_type`) where nothing is said.  Raises ConfigError, CapacityError.
        """
        # A file in float32 becomes half of its size in bfloat16; what is larger could not be held in any case.
        most = self.most_bytes * 4 // self._decoder.stream_dtype.itemsize
        config, tensors = _files(path, root, most + MAX_HEADER_BYTES)
        technique = technique or _technique(config)
        Part(SLOT, technique, (("name", name),)).build()  # says what is wrong with the name
        part = lookup(SLOT, technique)
        try:
            made = part.read(config, tensors, self._sites)  # type: ignore[attr-defined]
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        digest = hashlib.blake2b(digest_size=32, person=b"weft.adapter")
        placed = {}
        for where, group in sorted(made.items()):
            placed[where] = tuple(t.to(self._decoder.stream_dtype).to(self._decoder.device) for t in group)
            for tensor in placed[where]:
                digest.update(repr((technique, where, tuple(tensor.shape))).encode())
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
                self._decoder.cut(tensor)  # tried now, not in a step
        return Adapter(name, technique, path, digest.digest(), placed, partial(_multiply, self._decoder))

    def enter(self, adapter: Adapter) -> Adapter:
        """Make an adapter known under its name, in the place of one of that name that nobody uses.

        Raises RequestError where the name is in use with other contents, CapacityError where there is no room.
        """
        old = self._loaded.get(adapter.name)
        if old is not None and old.digest == adapter.digest:
            return old
        self._unused(adapter.name, "loaded anew")
        if old is None and len(self._loaded) >= self.most:
            raise CapacityError(
                f"{self.most} adapters are loaded, as many as there may be; drop one, or raise --max-loras"
            )
        taken = self.bytes - (old.bytes if old is not None else 0)
        if taken + adapter.bytes > self.most_bytes:
            raise CapacityError(
                f"the adapter takes {adapter.bytes} bytes, {taken} of {self.most_bytes} are taken; drop one, or raise "
                "--lora-memory"
            )
        self._loaded[adapter.name] = adapter
        self._forget(old)
        return adapter

    def drop(self, name: str) -> None:
        """Let go of an adapter.  Raises RequestError where there is none, or where somebody uses it."""
        if name not in self._loaded:
            there = ", ".join(map(repr, self._loaded)) or "none"
            raise RequestError(
                f"no adapter {name[:200]!r} is loaded; there is {there}", param="lora_name", code="adapter_not_found"
            )
        self._unused(name, "dropped")
        self._forget(self._loaded.pop(name))

    def _unused(self, name: str, what: str) -> None:
        users = self.users(name)
        if users:
            raise RequestError(
                f"the adapter {name!r} is used by {users} live request{'s' * (users > 1)} and cannot be {what}; "
                "try again once they have ended",
                param="lora_name",
                code="adapter_in_use",
            )

    def _forget(self, old: Adapter | None) -> None:
        """Stacks that are kept at hand must not go on with an adapter that has gone."""
        for engine in self._engines if old is not None else ():
            engine.stacks.forget(lambda stack: _adapter_of(stack) is old)


def _adapter_of(stack: Stack) -> Any:
    return getattr(stack.get(SLOT), "adapter", None)


def sites(spec: DecoderSpec) -> dict[str, Site]:
    """Where the checkpoint's weights lie in the products that a delta may change."""
    found = {}
    for part in families()[spec.family].parts(spec):
        layer, _, product = part.target.partition(".")
        if product in PRODUCTS:
            found[part.name] = Site(int(layer), product, part.first, part.shape[1], part.shape[0])
    return found


def _multiply(decoder: Decoder, x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in the row counts that agree with each other, as the decoder's own products are."""
    count = len(x)
    slabs = decoder.cut(weight)(count)
    rows = slabs[-1][0] + slabs[-1][1]
    if rows > count:
        x = torch.nn.functional.pad(x, (0, 0, 0, rows - count))
    out = x.new_empty(rows, len(weight))
    decoder.ops.linear(x.contiguous(), weight, None, out, slabs)
    return out[:count]


# ---------------------------------------------------------------------------------------------- files


def _technique(config: Mapping[str, Any]) -> str:
    """The technique that bears the name of an adapter's kind; any of them says what is wrong with a kind that none has."""
    kind, known = str(config.get("peft_type", "")).lower(), names(SLOT)
    return kind if kind in known else known[0]


def _files(path: str, root: str | None, most_bytes: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, float32 tensors by name) of an adapter's folder.  Raises ConfigError; RequestError outside of `root`."""
    folder = Path(path) if root is None else Path(root) / path
    raw = _content(folder, CONFIG, root, MAX_CONFIG_BYTES)
    if raw is None:
        raise ConfigError(f"{path} has no {CONFIG}; give the folder of an adapter in the form of the package peft")
    try:
        config = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {CONFIG} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: {CONFIG} holds {type(config).__name__}; expected a JSON object")
    data = _content(folder, TENSORS, root, most_bytes)
    if data is None:
        if _content(folder, "adapter_model.bin", root, 0, look=True) is not None:
            raise ConfigError(
                f"{path} has its weights only as a pickle file, which can run code when opened and is never loaded; save the "
                "adapter as safetensors"
            )
        raise ConfigError(f"{path} has no {TENSORS}")
    try:
        stored = deserialize(data)
    except SafetensorError as error:
        raise ConfigError(f"{path}: {TENSORS} is not a whole safetensors file ({error}); fetch it again") from None
    del data
    return config, {name: _tensor(path, name, entry) for name, entry in stored}


def _tensor(path: str, name: str, entry: Mapping[str, Any]) -> Tensor:
    dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
    if dtype is None:
        known = ", ".join(SAFETENSORS_DTYPES)
        raise ConfigError(
            f"{path}: {name[:200]} is stored as {entry['dtype']}, which weft can't read; it reads {known}"
        )
    if not entry["data"] or len(entry["shape"]) > MAX_DIMS:  # beside a zero, other sizes may be what torch can't hold
        raise ConfigError(
            f"{path}: {name[:200]} has the shape {str(list(entry['shape']))[:100]}, which has no values or more than {MAX_DIMS} "
            "dimensions; fetch it again"
        )
    tensor = torch.frombuffer(entry["data"], dtype=dtype).view(entry["shape"]).float()
    if not bool(tensor.isfinite().all()):
        raise ConfigError(f"{path}: {name[:200]} has values that are no finite numbers; the adapter is damaged")
    return tensor


def _content(folder: Path, name: str, root: str | None, most_bytes: int, *, look: bool = False) -> bytes | None:
    """The bytes of a file, None where there is none.  look: only whether it is there."""
    try:
        handle = _open(folder / name, root)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name} of the adapter cannot be opened: {reason}") from None
    found = os.fstat(handle)
    if look or not stat.S_ISREG(found.st_mode):
        os.close(handle)
        if look:
            return b""
        raise ConfigError(f"{name} of the adapter is no regular file")
    with open(handle, "rb") as file:
        if found.st_size > most_bytes:
            raise CapacityError(
                f"{name} of the adapter has {found.st_size} bytes, more than the {most_bytes} that are read; raise --lora-memory"
            )
        return file.read(found.st_size)


def _open(path: Path, root: str | None) -> int:
    """A file descriptor.  Below a root every step of the resolved path is opened by itself and must be no link, so that nobody
    who changes the folder meanwhile leads out of it."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    if root is None:
        return os.open(os.path.realpath(path), flags)
    base, real = Path(os.path.realpath(root)), Path(os.path.realpath(path))
    if not real.is_relative_to(base):
        # Whether anything is there is nobody's business.
        raise RequestError(
            "the path leads out of the folder that --lora-root names; give one below it",
            param="lora_path",
            code="forbidden",
        )
    at = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        *folders, last = real.relative_to(base).parts
        for step in folders:
            at, old = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at), at
            os.close(old)
        return os.open(last, flags | os.O_NOFOLLOW, dir_fd=at)
    finally:
        os.close(at)
