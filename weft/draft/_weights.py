"""Files of weights that drafts come with: safetensors that say what they are, and which model they were made for.

A file has, beside its tensors, `mark`: the embeddings of a few tokens, by which the model that it was made for is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.slots import Target

MARKS = 8
OTHER = 0.5
"""Of the embeddings that a file remembers: how far off a model's may be, which can be rounded to few bits."""
HEADER_BYTES = 1 << 16
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Kind:
    """name: what a file says that it is.  what: in messages.  make: how one is made."""

    name: str
    what: str
    make: str


def marked(vocab: int) -> list[int]:
    """Tokens whose embeddings a file holds, to know its model by."""
    return [i * vocab // MARKS for i in range(MARKS)]


def read_shapes(path: Path, kind: Kind, sound: Callable[[Shapes], int]) -> tuple[Shapes, int]:
    """(shape of every tensor but the mark, vocabulary) of a file; nothing else of it is read.

    sound: the model's width, if these shapes are those of a whole file; it raises KeyError or ValueError otherwise.
    Raises ConfigError for a file that is missing, or is none of this kind.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= HEADER_BYTES:
                raise ValueError("it does not begin as a safetensors file does")
            said = json.loads(file.read(size))
    except OSError as error:
        raise ConfigError(f"the {kind.what} {path} cannot be read: {error.strerror}; {kind.make}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no file of {kind.what}: {error}; {kind.make}") from None
    try:
        told = said.pop("__metadata__")
        vocab, shapes = int(told["vocab"]), {name: tuple(entry["shape"]) for name, entry in said.items()}
        mark = shapes.pop("mark")
        whole = told["kind"] == kind.name and mark == (MARKS, sound(shapes)) and vocab > 0
    except (AttributeError, KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ConfigError(f"{path} is no file of {kind.what}, or one of another version of weft; {kind.make}")
    return shapes, vocab


def read_tensors(path: Path, kind: Kind, width: int, vocab: int, target: Target) -> dict[str, Any]:
    """Float32, where the target is.  Raises ConfigError where they are damaged, or were trained for another model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (width, vocab) != (target.width, target.vocab):
        raise ConfigError(
            f"the {kind.what} in {path} were trained for a model of width {width} with {vocab} tokens, and this one has "
            f"width {target.width} and {target.vocab} tokens; {kind.make}"
        )
    try:
        found = {name: tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"the {kind.what} {path} cannot be read: {error}; {kind.make}") from None
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        raise ConfigError(f"the {kind.what} in {path} have values that are no finite numbers; {kind.make}")
    mine = target.embed(marked(vocab))
    mark = found.pop("mark").to(mine.device)
    if float((mine - mark).norm()) > OTHER * float(mark.norm()):
        raise ConfigError(f"the {kind.what} in {path} were trained for another model than this one; {kind.make}")
    return {name: tensor.to(mine.device) for name, tensor in found.items()}
