"""Tokenizers inside GGUF files: ggml's own pairs of texts and ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from weft.front.tokenizer import Tokenizer

Shared = Callable[[str], Path]


def cases(shared: Shared, name: str) -> list[tuple[str, list[int]]]:
    """llama.cpp's own pairs: text, and one line of ids for it."""
    stem = shared(f"data/tokenizers/ggml-vocab/ggml-vocab-{name}.gguf.inp")
    texts = stem.read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = stem.with_suffix(".out").read_text().split("\n")
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines)]


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "gpt-2", "mpt", "falcon"])
def test_ggml_vectors(shared: Shared, name: str) -> None:
    tokenizer = Tokenizer.load(shared(f"data/tokenizers/ggml-vocab/ggml-vocab-{name}.gguf"))
    pairs = cases(shared, name)
    assert len(pairs) >= 46
    for text, ids in pairs:
        assert tokenizer.encode(text, add_special=False) == ids, repr(text)
