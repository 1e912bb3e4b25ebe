"""A whole model folder, converted beside the one that it came from: all of it or nothing."""

from __future__ import annotations

import fnmatch
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from weft.errors import CapacityError, ConfigError
from weft.hub import NEVER

WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.gguf",
    "*.onnx",
    "*.msgpack",
    "*.npz",
    "*.npy",
    "config.json",
)
"""What a converted folder has anew or not at all."""
MAX_COPIED_BYTES = 256 << 20


@contextmanager
def made(out: Path) -> Iterator[Path]:
    """An empty folder that becomes `out` when the block ends well, and is removed when it does not.

    Raises ConfigError where `out` is there already or its parent is not.
    """
    out = out.expanduser()
    _free(out)
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent} to write {out.name} into; make it first")
    # Named before it is made, so that it is removed even where a signal comes the moment that it is there.
    draft = out.parent / f".{out.name}-{secrets.token_hex(8)}"
    try:
        try:
            draft.mkdir(0o700)
        except OSError as error:
            raise ConfigError(f"{out.parent} cannot be written to: {error.strerror}") from None
        yield draft
        draft.chmod(0o755)
        _free(out)
        os.rename(draft, out)
    except OSError as error:
        raise CapacityError(f"{out} could not be written: {error.strerror or error}; nothing of it is left") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _free(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} is there already; weft convert overwrites nothing: name a new folder")


def require_room(out: Path, size_bytes: int, spoken: Callable[[int], str]) -> None:
    """Raises CapacityError where the disk of `out` has less than that free."""
    parent = out.expanduser().parent
    free = shutil.disk_usage(parent).free if parent.is_dir() else size_bytes
    if free < size_bytes:
        raise CapacityError(f"{out} takes about {spoken(size_bytes)}, and its disk has {spoken(free)} free")


def copy_rest(folder: Path, out: Path) -> list[str]:
    """Copy what stands beside the weights: tokenizer, template, licence.  Gives the names of the files that were left out.

    Folders and hidden files are passed over; code, pickles and other weights are left out.
    """
    left = []
    for path in sorted(folder.iterdir()):
        if (
            path.name.startswith(".")
            or not path.is_file()
            or _any(path.name, WEIGHTS[:2])
            or path.name == "config.json"
        ):
            continue
        if _any(path.name, NEVER) or _any(path.name, WEIGHTS) or path.stat().st_size > MAX_COPIED_BYTES:
            left.append(path.name)
        else:
            shutil.copyfile(path, out / path.name)
    return left


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)
