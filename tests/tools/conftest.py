"""The bundled model as tools read it: what drafts of it are taught by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def teacher(bundled: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(bundled, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(bundled: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(bundled)
