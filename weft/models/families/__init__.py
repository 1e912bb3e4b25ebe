"""Families: one short file each, from a `config.json` to a `DecoderSpec` and the names of its weights.

A family's file defines

    MODEL_TYPE      `model_type` in config.json
    ARCHITECTURE    the class that `architectures` names
    spec(config) -> DecoderSpec
    parts(spec) -> Iterator[Part]       checkpoint names, see `weft.models.layout`

and is found by standing in this folder.  An architecture without a file is refused here; this is the place where a later
`weft.models.hf`, which runs any architecture through the transformers package with our paged attention, would be asked.
`auto_map` (Python code that a checkpoint brings along) is never read, let alone run.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

from weft.errors import ConfigError
from weft.models.families._config import Config
from weft.models.spec import DecoderSpec


@cache
def families() -> dict[str, ModuleType]:
    """Every family's module by its name, which is also its `model_type`."""
    found = {}
    for entry in pkgutil.iter_modules(__path__):
        if not entry.name.startswith("_"):
            found[entry.name] = importlib.import_module(f"{__name__}.{entry.name}")
    return found


def read(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder that a `config.json` describes.

    Raises ConfigError for an unknown architecture (naming the known ones), weights stored in few bits as weft can't read
    them, or a value that is missing
    or cannot be.
    """
    known = families()
    architectures = config.get("architectures")
    if architectures is not None and not isinstance(architectures, list):
        raise Config(config).refuse("architectures", "a list of class names")
    named = [family for family in known.values() if family.ARCHITECTURE in (architectures or ())]
    if not architectures:
        named = [family for family in known.values() if config.get("model_type") == family.MODEL_TYPE]
    if not named:
        shown = ", ".join(map(str, architectures or [config.get("model_type")]))
        listing = ", ".join(sorted(family.ARCHITECTURE for family in known.values()))
        raise ConfigError(f"the architecture {shown} is not supported; weft runs {listing}")
    if config.get("quantization_config") is not None:
        from weft.models.checkpoints.scheme import scheme  # which reads config.json as families do

        scheme(config)
    result = named[0].spec(Config(config, file=str(config.get("gguf_file", "config.json"))))
    assert isinstance(result, DecoderSpec)
    return result
