"""weft: an inference and serving engine for language models.

    from weft import LLM, SamplingParams

    with LLM("bundled") as llm:
        for result in llm.generate(["The sea was"], SamplingParams(max_tokens=32, seed=7)):
            print(result.outputs[0].text)

Names are loaded when they are first used, so that `import weft` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weft.async_llm import AsyncLLM
    from weft.errors import (
        CapacityError,
        ComposeError,
        ConfigError,
        EngineError,
        InvariantError,
        RequestError,
        TransferError,
    )
    from weft.llm import LLM
    from weft.sampling import BeamSearchParams, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CapacityError",
    "ComposeError",
    "ConfigError",
    "EngineError",
    "InvariantError",
    "RequestError",
    "SamplingParams",
    "TransferError",
    "__version__",
]

_ERRORS = (
    "CapacityError",
    "ComposeError",
    "ConfigError",
    "EngineError",
    "InvariantError",
    "RequestError",
    "TransferError",
)
_HOME = {
    "LLM": "weft.llm",
    "AsyncLLM": "weft.async_llm",
    "SamplingParams": "weft.sampling",
    "BeamSearchParams": "weft.sampling",
    **dict.fromkeys(_ERRORS, "weft.errors"),
}


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'weft' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
