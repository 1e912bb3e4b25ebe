"""The vocabulary of an engine's model, for techniques that look at what tokens stand for; read when the first one asks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from weft.errors import ConfigError
from weft.hub import BUNDLED, resolve, resolve_draft
from weft.slots import Vocabulary

T = TypeVar("T")
MOST_KEPT = 256
"""Things made of the vocabulary that are kept; what was not used for longest goes first."""
MOST_BYTES = 1 << 18
"""Of their sources, in all: a thing made of a grammar has many times the size of what it was written in."""


class VocabularyShelf:
    """read: gives the vocabulary, or raises ConfigError; None where nobody knows the model's tokenizer (a bare config).
    others: gives that of the model in a folder."""

    def __init__(
        self, read: Callable[[], Vocabulary] | None = None, others: Callable[[Path], Vocabulary] | None = None
    ) -> None:
        self._read, self._others = read, others
        self._found: Vocabulary | None = None
        self._made: OrderedDict[str, Future[Any]] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._lock, self._reading = threading.Lock(), threading.Lock()

    @property
    def vocabulary(self) -> Vocabulary:
        with self._reading:
            if self._found is None:
                if self._read is None:
                    raise ConfigError(
                        "this engine was built without a tokenizer, so it does not know what its tokens stand for"
                    )
                found = self._read()
                if not found.ends:
                    raise ConfigError("this model has no token that ends an output, so no grammar could end one")
                self._found = found
            return self._found

    def of(self, model: str) -> Vocabulary:
        """That of another model; the bundled draft has the bundled model's.  Raises ConfigError."""
        if self._others is None:
            raise ConfigError(f"this engine was built without what reads the tokenizer of {model}")
        return self._others(resolve(None) if model == BUNDLED else resolve_draft(model))

    def once(self, key: str, make: Callable[[Vocabulary], T], size: int = 0) -> T:
        """What `make` makes of the vocabulary, made once for each key while it is kept.  Who asks for it meanwhile waits for
        that one alone; what fails is told to all of them, and made again for the next.  size: bytes of what it is made from."""
        with self._lock:
            made = self._made.get(key)
            mine = made is None
            if made is None:
                made = self._made[key] = Future()
                self._sizes[key] = size
            self._made.move_to_end(key)
        if mine:
            try:
                made.set_result(make(self.vocabulary))
            except BaseException as error:
                made.set_exception(error)
                with self._lock:
                    self._made.pop(key, None)
                    self._sizes.pop(key, None)
            with self._lock:
                while len(self._made) > MOST_KEPT or sum(self._sizes.values()) > MOST_BYTES:
                    gone, _ = self._made.popitem(last=False)
                    self._sizes.pop(gone)
        found: T = made.result()
        return found
