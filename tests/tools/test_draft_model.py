"""The bundled draft: small, of the bundled model's vocabulary, read by weft as by transformers, and worth its guesses."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.models.harness import Rows, bench_for
from tools.tiny.accept import Prompts, judge, spoken
from tools.tiny.corpus import Corpus
from weft.models import load_spec

MOST_BYTES = 5_500_000
TEXT = (
    "<|user|>What is the number of Emma's lamp?<|end|><|assistant|>4031<|end|>The squire came down to the water, and "
    "they lay all night in the shadow of the island, waiting for the tide to turn and the wind to fall."
)
JUDGED = 8
"""Prompts of each kind; the figures in the draft's README are of 64."""
BOUNDS = {"novels": (0.75, 0.62), "chat": (0.68, 0.55)}
"""Greedy acceptance and overlap at temperature 1 that each kind must reach.  Recall is left out: its answers are too short to
judge by eight."""


@pytest.fixture(scope="module")
def folder(bundled: Path) -> Path:
    return bundled.parent / "draft"


def test_it_is_small_and_whole(folder: Path) -> None:
    """In bf16, every tensor once, nothing else in the file; the output head is the embedding."""
    data = (folder / "model.safetensors").read_bytes()
    assert len(data) <= MOST_BYTES
    (header_bytes,) = struct.unpack("<Q", data[:8])
    tensors = {name: t for name, t in json.loads(data[8 : 8 + header_bytes]).items() if name != "__metadata__"}
    assert {t["dtype"] for t in tensors.values()} == {"BF16"}
    assert max(t["data_offsets"][1] for t in tensors.values()) == len(data) - 8 - header_bytes
    assert "lm_head.weight" not in tensors
    assert (folder / "README.md").exists()


def test_it_speaks_the_bundled_models_vocabulary(folder: Path, bundled: Path) -> None:
    mine, model = (json.loads((path / "config.json").read_text()) for path in (folder, bundled))
    for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "model_type"):
        assert mine[key] == model[key], key
    assert load_spec(folder).vocab == load_spec(bundled).vocab == 4096
    assert load_spec(folder).max_positions == load_spec(bundled).max_positions
    assert not (folder / "tokenizer.json").exists(), "one tokenizer, beside the model"


@torch.no_grad()
def test_logits_are_those_of_transformers(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """In one piece, in chunks, and token by token."""
    tokens = tokenizer(TEXT)["input_ids"]
    wanted = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
    bench = bench_for(load_spec(folder), folder)
    assert (bench.run([Rows("a", tokens, 0)])[0] - wanted).abs().max() < 1e-3
    assert (bench.chunked("b", tokens, 7) - wanted).abs().max() < 1e-3
    assert bench.greedy("c", tokens[:20], 12) == follow(wanted, tokens, folder)


def follow(wanted: torch.Tensor, tokens: list[int], folder: Path) -> list[int]:
    """Twelve greedy tokens after the first twenty, by transformers without a cache."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = list(tokens[:20])
    for _ in range(12):
        text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[20:]


def test_it_guesses_what_the_model_says(
    folder: Path, bundled: Path, tokenizer: PreTrainedTokenizerFast, shared: Callable[[str], Path]
) -> None:
    """On prompts from novels that neither the model nor the draft was taught."""
    corpus = Corpus(shared("data"))
    model, draft = (LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (bundled, folder))
    prompts = Prompts(corpus, tokenizer)
    for kind, (greedy, overlap) in BOUNDS.items():
        found = judge(draft, model, spoken(model, prompts.rows(kind, JUDGED)))
        assert found["greedy"]["accepted"] > greedy, kind
        assert found["sampled"]["overlap"] > overlap, kind
