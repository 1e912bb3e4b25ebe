"""Ids equal to vectors that nobody here wrote, and to what the reference libraries give for the same text."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.front.tokenizer import Tokenizer

Load = Callable[..., Tokenizer]
Shared = Callable[[str], Path]

ALPHABET = "ab cde  XY\n\t.,'\"!0123é\u0301ß你好ก😀👍🏽\u2581\u00a0\u200b<s>|#(){}_\r"


def odd_texts(seed: int, count: int) -> list[str]:
    """Random strings over characters that tokenizers disagree about."""
    rng = random.Random(seed)
    return ["".join(rng.choice(ALPHABET) for _ in range(rng.randint(0, 40))) for _ in range(count)]


def prose(shared: Shared) -> list[str]:
    text = shared("data/text/tinyshakespeare/input.txt").read_text()[:120_000]
    return text.split("\n\n")


def ggml_cases(shared: Shared, name: str) -> list[tuple[str, list[int]]]:
    """llama.cpp's own pairs: text, and one line of ids for it."""
    stem = shared(f"data/tokenizers/ggml-vocab/ggml-vocab-{name}.gguf.inp")
    cases = stem.read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = stem.with_suffix(".out").read_text().split("\n")
    return [(case, [int(i) for i in line.split()]) for case, line in zip(cases, lines)]


@pytest.mark.parametrize(
    ("name", "vectors"),
    [("llama3", "llama-bpe"), ("llama2", "llama-spm"), ("gpt2", "gpt-2"), ("phi-3", "phi-3"), ("falcon", "falcon")],
)
def test_ggml_vectors(tokenizer_of: Load, shared: Shared, name: str, vectors: str) -> None:
    tokenizer, cases = tokenizer_of(name), ggml_cases(shared, vectors)
    assert len(cases) >= 46
    for text, ids in cases:
        assert tokenizer.encode(text, add_special=False) == ids, repr(text)


@pytest.mark.parametrize(
    ("name", "file"),
    [("r50k", "tokens_r50k_base"), ("gpt2", "tokens_gpt2"), ("cl100k", "tokens"), ("o200k", "tokens_gpt4o")],
)
def test_tiktoken_vectors(tokenizer_of: Load, shared: Shared, name: str, file: str) -> None:
    text = shared("data/tokenizers/tiktoken/vectors/lib.rs.txt").read_text()
    want = json.loads(shared(f"data/tokenizers/tiktoken/vectors/{file}.json").read_text())
    tokenizer = tokenizer_of(name)
    assert tokenizer.encode(text, add_special=False) == want
    assert tokenizer.decode(want) == text


@pytest.mark.parametrize("version", [1, 2, 3])
def test_mistral_vectors(tokenizer_of: Load, shared: Shared, version: int) -> None:
    """Rendered conversations (with visible spaces and newlines) and their ids."""
    tokenizer = tokenizer_of(f"mistral{version}", legacy=False)
    samples = sorted(shared("data/templates/mistral-common/samples").glob(f"*/tokens_v{version}.json"))
    assert samples
    for path in samples:
        want = json.loads(path.read_text())["tokens"]
        shown = path.with_name(f"text_v{version}.txt").read_text()
        text = shown.replace("\u2581", " ").replace("<0x0A>", "\n")
        assert tokenizer.encode(text, add_special=False) == want, path.parent.name
        assert tokenizer.encode(text) == want, "BOS stands in the text and must not come twice"


@pytest.mark.parametrize(
    ("name", "path"),
    [("llama2", "llama2/tokenizer.model"), *((f"mistral{v}", f"mistral/tokenizer.model.v{v}") for v in (1, 2, 3))],
)
def test_equals_sentencepiece(tokenizer_of: Load, shared: Shared, name: str, path: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(shared(f"data/tokenizers/{path}")))
    tokenizer = tokenizer_of(name)
    for text in prose(shared)[:100] + odd_texts(1, 400):
        ids = reference.encode(text)
        assert tokenizer.encode(text, add_special=False, parse_special=False) == ids, repr(text)
    assert tokenizer.vocab_size == reference.vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (reference.bos_id(), (reference.eos_id(),))


def test_equals_tiktoken(tokenizer_of: Load, shared: Shared) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    ranks = load_tiktoken_bpe(str(shared("data/tokenizers/llama3/tokenizer.model")))
    reference = tiktoken.Encoding("llama3", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    tokenizer = tokenizer_of("llama3")
    for text in prose(shared)[:100] + odd_texts(2, 400):
        ids = reference.encode_ordinary(text)
        assert tokenizer.encode(text, add_special=False) == ids, repr(text)
        for i in ids:
            assert tokenizer.token_bytes(i) == reference.decode_single_token_bytes(i)


@pytest.mark.parametrize("name", ["bundled", "hf/phi-2", "hf/phi-3-mini", "hf/falcon"])
def test_equals_transformers(tokenizer_of: Load, shared: Shared, bundled: Path, name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = bundled if name == "bundled" else shared(f"data/tokenizers/{name}")
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) if config_path.exists() else {}
    named = {k: v for k, v in config.items() if re.fullmatch(r"(bos|eos|pad|unk)_token|add_(bos|eos)_token", k)}
    reference = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named)
    tokenizer = tokenizer_of(name.removeprefix("hf/").replace("-mini", ""))
    for text in [*odd_texts(3, 250), "<|end|> <|user|>x<|endoftext|>"]:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special=False) == reference.decode(ids, skip_special_tokens=False)
    assert tokenizer.bos_id == reference.bos_token_id


NAMES = ["bundled", "llama2", "llama3", "gpt2", "phi-2", "phi-3"]
"""Tokenizers with all 256 bytes in their vocabulary (Falcon's lacks some control characters)."""


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_text_survives(tokenizer_of: Load, name: str, text: str) -> None:
    """Encoding and decoding gives the text back (none of these tokenizers normalizes), and so do the tokens' bytes."""
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert tokenizer.decode(ids, skip_special=False) == text
    joined = b"".join(tokenizer.token_bytes(i) for i in ids)
    added_space = tokenizer.plan.byte_fallback and text
    assert joined == (b" " if added_space else b"") + text.encode()
