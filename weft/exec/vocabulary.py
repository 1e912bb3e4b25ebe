"""The vocabulary of an engine's model, for techniques that look at what tokens stand for; read when the first one asks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from weft.errors import ConfigError
from weft.slots import Vocabulary

T = TypeVar("T")


class VocabularyShelf:
    """read: gives the vocabulary, or raises ConfigError; None where nobody knows the model's tokenizer (a bare config)."""

    def __init__(self, read: Callable[[], Vocabulary] | None = None) -> None:
        self._read = read
        self._found: Vocabulary | None = None
        self._made: dict[str, object] = {}
        self._lock = threading.RLock()

    @property
    def vocabulary(self) -> Vocabulary:
        with self._lock:
            if self._found is None:
                if self._read is None:
                    raise ConfigError(
                        "this engine was built without a tokenizer, so it does not know what its tokens stand for"
                    )
                self._found = self._read()
                if not self._found.ends:
                    raise ConfigError("this model has no token that ends an output, so no grammar could end one")
            return self._found

    def once(self, key: str, make: Callable[[Vocabulary], T]) -> T:
        """What `make` makes of the vocabulary, made once for each key."""
        with self._lock:
            if key not in self._made:
                self._made[key] = make(self.vocabulary)
            return self._made[key]  # type: ignore[return-value]
