"""Recipes: a stack as a TOML file, the same that `--with` writes on the command line.

    [stack]
    schedule = "prefill_first"
    draft = "ngram(guesses=6)"
    kv.compress = "streaming_llm(window=1020)"

Nothing else may stand in it; a recipe names techniques, it does not load files.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.registry import Part, parse
from weft.slots import SLOTS

MAX_BYTES = 1 << 16


def read(path: str | Path) -> list[Part]:
    """The parts of a recipe.  Raises ConfigError naming the file and what to change."""
    file = Path(path).expanduser()
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ConfigError(f"the recipe {path} has more than {MAX_BYTES} bytes, which no recipe needs")
        text = file.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error}") from None
    try:
        return parts(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parts(text: str) -> list[Part]:
    """The parts of a recipe's text.  Raises ConfigError."""
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"this is no TOML: {error}") from None
    for key in document:
        if key != "stack":
            raise ConfigError(f"a recipe has one table, [stack]; it has no {key!r}")
    stack = document.get("stack")
    if not isinstance(stack, Mapping) or not stack:
        raise ConfigError('a recipe needs a table [stack] with lines such as  draft = "ngram"')
    return [parse(f"{slot}={call}") for slot, call in _calls(stack)]


def _calls(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(slot, call) of each line; kv.evict = "lru" and "kv.evict" = "lru" are the same slot."""
    for key, value in table.items():
        slot = prefix + key
        if isinstance(value, Mapping) and not prefix and any(name.startswith(slot + ".") for name in SLOTS):
            yield from _calls(value, slot + ".")
        elif isinstance(value, str):
            yield slot, value
        else:
            raise ConfigError(f'{slot}: write a technique as text, as in  {slot} = "name(argument=value)"')


def merged(recipe: Sequence[Part], given: Sequence[Part]) -> list[Part]:
    """A recipe's parts, with those that were given beside it in the place of its own."""
    named = {part.slot for part in given}
    return [*(part for part in recipe if part.slot not in named), *given]
