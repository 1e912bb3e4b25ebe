"""Models as data, their weights, and the decoder that runs them.  Importing this package imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.models.gguf import checkpoint, header
from weft.models.spec import DTYPE_BYTES, DecoderSpec

MAX_CONFIG_BYTES = 16 << 20


def load_config(path: Path | str) -> dict[str, Any]:
    """The `config.json` of a model folder, the given JSON file, or what a GGUF file says, as a dict.  Raises ConfigError."""
    file = Path(path)
    if header.is_gguf(file):
        return checkpoint.config(file)
    if file.is_dir():
        file = file / "config.json"
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{file} has more than {MAX_CONFIG_BYTES} bytes, which no config.json has")
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"{file} does not exist; a model is a folder with config.json and safetensors, or a GGUF file"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds {type(found).__name__}; expected a JSON object")
    return found


def load_spec(path: Path | str) -> DecoderSpec:
    """The decoder that a folder, a config file or a GGUF file describes.  Raises ConfigError naming the key that is wrong."""
    from weft.models.families import read

    return read(load_config(path))


def checkpoint_dtype(config: dict[str, Any]) -> str | None:
    """The number format that a checkpoint was saved in, by its `config.json`, where it is one that weft computes in."""
    name = config.get("dtype", config.get("torch_dtype"))
    return name if isinstance(name, str) and name in DTYPE_BYTES else None
