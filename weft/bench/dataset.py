"""Requests for `weft bench serve`: from a file in one of the forms that are about, or made up."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import ConfigError

MOST_BYTES = 2 << 30
WORDS = (
    "the a sea wind boat harbour light stone winter morning letter garden river clock town bread friend window rain song child "
    "went came saw took gave found said knew under over with before again slowly old small dark bright"
).split()


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a prompt, or messages.  max_tokens: where the data says how long the answer was."""

    messages: tuple[dict[str, str], ...]
    max_tokens: int | None = None

    @property
    def prompt(self) -> str:
        return "\n".join(message["content"] for message in self.messages)


def made_up(count: int, words: int, seed: int) -> list[Ask]:
    """Prompts of so many words, no two alike: nothing of them is found in a prefix cache."""
    draw = random.Random(seed)
    return [_user(f"{draw.getrandbits(48):x} " + " ".join(draw.choices(WORDS, k=words))) for _ in range(count)]


def read_dataset(path: Path, count: int, seed: int) -> list[Ask]:
    """`count` requests of a file, in an order drawn from `seed`; from the beginning again where it has fewer.

    .jsonl: lines with "messages", "prompt", "text", "turns" or "question", perhaps with "max_tokens" or "output_tokens".  .json:
    a list of the same, or of ShareGPT's conversations.  Anything else: a prompt on each line.  Raises ConfigError.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path} is larger than {MOST_BYTES} bytes; take a part of it")
        text = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give another file with --dataset") from None
    found = list(_asks(path, text))
    if not found:
        raise ConfigError(f"{path} has no prompts; see weft bench serve --help for its form")
    random.Random(seed).shuffle(found)
    return [found[i % len(found)] for i in range(count)]


def _asks(path: Path, text: str) -> Iterator[Ask]:
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield from _ask(_json(path, line, f"line {number}"))
    elif path.suffix == ".json":
        whole = _json(path, text, "the file")
        if not isinstance(whole, list):
            raise ConfigError(f"{path} must hold a list")
        for record in whole:
            yield from _ask(record)
    else:
        yield from (_user(line) for line in text.splitlines() if line.strip())


def _ask(record: Any) -> Iterator[Ask]:
    """The request of a record; none where it has no text."""
    if not isinstance(record, dict):
        return
    most = record.get("max_tokens", record.get("output_tokens"))
    most = most if isinstance(most, int) and most > 0 else None
    if isinstance(record.get("body"), dict):  # a line of a batch
        yield from _ask(record["body"])
        return
    messages = record.get("messages")
    if isinstance(messages, list):
        plain = [m for m in messages if isinstance(m, dict) and isinstance(m.get("content"), str)]
        if plain:
            yield Ask(tuple({"role": str(m.get("role", "user")), "content": m["content"]} for m in plain), most)
        return
    if isinstance(record.get("conversations"), list):  # ShareGPT
        turns = [t.get("value") for t in record["conversations"] if isinstance(t, dict)]
        if turns and isinstance(turns[0], str) and turns[0].strip():
            yield _user(turns[0], most)
        return
    for name in ("prompt", "text", "turns", "question"):
        value = record.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str) and value.strip():
            yield _user(value, most)
            return


def _user(text: str, most: int | None = None) -> Ask:
    return Ask(({"role": "user", "content": text},), most)


def _json(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {where} is not JSON ({error})") from None
