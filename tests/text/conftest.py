"""Tokenizers for the tests of text: the bundled one, and those in the shared data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from weft.front.tokenizer import Tokenizer

FOLDERS = {
    "llama3": "data/tokenizers/llama3",
    "llama2": "data/tokenizers/llama2",
    "gpt2": "data/tokenizers/gpt2",
    "phi-3": "data/tokenizers/hf/phi-3-mini",
    "phi-2": "data/tokenizers/hf/phi-2",
    "falcon": "data/tokenizers/hf/falcon",
    "t5": "data/tokenizers/hf/t5-small",
}
FILES = {
    "r50k": ("data/tokenizers/tiktoken/r50k_base.tiktoken", "r50k_base.tiktoken"),
    "cl100k": ("data/tokenizers/tiktoken/cl100k_base.tiktoken", "cl100k_base.tiktoken"),
    "o200k": ("data/tokenizers/tiktoken/o200k_base.tiktoken", "o200k_base.tiktoken"),
    "mistral1": ("data/tokenizers/mistral/tokenizer.model.v1", "tokenizer.model"),
    "mistral2": ("data/tokenizers/mistral/tokenizer.model.v2", "tokenizer.model"),
    "mistral3": ("data/tokenizers/mistral/tokenizer.model.v3", "tokenizer.model"),
}
"""Single files whose names are not those of a checkpoint; linked into a folder of their own."""


@pytest.fixture(scope="session")
def tokenizer_of(
    shared: Callable[[str], Path], bundled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Tokenizer]:
    """`tokenizer_of("llama3")`, loaded once; settings become its tokenizer_config.json."""
    loaded: dict[str, Tokenizer] = {}

    def folder(name: str) -> Path:
        if name == "bundled":
            return bundled
        if name in FOLDERS:
            return shared(FOLDERS[name])
        source, target = FILES[name]
        made = tmp_path_factory.mktemp(name)
        (made / target).symlink_to(shared(source))
        return made

    def load(name: str, **settings: object) -> Tokenizer:
        key = json.dumps([name, settings], sort_keys=True)
        if key not in loaded:
            place = folder(name)
            if settings:
                (place / "tokenizer_config.json").write_text(json.dumps(settings))
            loaded[key] = Tokenizer.load(place)
        return loaded[key]

    return load
