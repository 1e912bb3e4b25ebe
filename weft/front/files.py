"""Reading a checkpoint's small text files, with errors that name the file and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weft.errors import ConfigError

MAX_JSON_BYTES = 512 << 20
"""The largest tokenizer files are about 40 MB."""


def read_bytes(path: Path) -> bytes:
    """The whole file.  ConfigError where it cannot be read or is absurdly large."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ConfigError(f"{path}: {size} bytes is too large for a tokenizer or configuration file")
        return path.read_bytes()
    except OSError as e:
        raise ConfigError(f"{path} cannot be read ({e.strerror or e}); check the file and its permissions") from e


def read_text(path: Path) -> str:
    """A UTF-8 file.  ConfigError where it is not."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not UTF-8 text; download it again") from e


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where the file does not exist.  ConfigError where it is broken."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is not valid JSON ({e}); the download may be cut short, fetch it again") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
