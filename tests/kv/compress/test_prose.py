"""The stated bounds, on novels that the bundled model has not read, and the comparison with a window and a lot of equal size."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.exec.conftest import Bench, spec
from weft.exec.build import Runtime
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.models.decoder import Seam

LENGTH, FIRST = 1024, 128
PLACES = (("Stevenson_Treasure_1883", 30_000), ("Doyle_Hound_1902", 30_000), ("Doyle_Hound_1902", 150_000))
BOUNDS = {
    "streaming_llm(sinks=4,window=124,every=32)": (1.05, 0.04),
    "h2o(heavy=64,recent=64,every=32)": (1.07, 0.06),
    "recent(window=128,every=32)": (1.05, 0.04),
    "random(chosen=64,recent=64,every=32)": (1.06, 0.05),
}
"""Perplexity, times the full cache's; mean KL divergence from the full cache's law, nats."""


@pytest.fixture(scope="module")
def texts(shared: Callable[[str], Path]) -> list[list[int]]:
    tokenizer = Tokenizer.load(resolve(None))
    found = []
    for name, at in PLACES:
        text = shared(f"data/text/novels/{name}.txt").read_text(encoding="utf8")[at : at + 8 * LENGTH]
        found.append(tokenizer.encode(text, add_special=False)[:LENGTH])
    return found


def laws(runtime: Runtime, ids: list[int], *techniques: str) -> Tensor:
    """Log-probabilities [LENGTH, vocab] of what follows each position, computed in steps between cuts."""
    out = torch.zeros(len(ids), runtime.setup.spec.vocab)

    def see(batch: object, tensors: tuple[Tensor, ...]) -> None:
        out[batch.positions_T[batch.logit_rows_N]] = tensors[0].log_softmax(-1)  # type: ignore[attr-defined]

    remove = runtime.decoder.hook(Seam.LOGITS, len(runtime.setup.spec.layers) - 1, see)
    try:
        bench = Bench(runtime, techniques=techniques, share=False)
        bench.run([spec(1, ids, temperature=0.0, max_tokens=1, prompt_logprobs=0)])
    finally:
        remove()
    return out


@pytest.fixture(scope="module")
def full(runtime: Runtime, texts: list[list[int]]) -> list[Tensor]:
    return [laws(runtime, ids) for ids in texts]


def loss(law: Tensor, ids: list[int]) -> float:
    return -float(law[FIRST:-1].gather(1, torch.tensor(ids[FIRST + 1 :])[:, None]).mean())


@pytest.mark.parametrize("technique", BOUNDS)
def test_stays_within_its_bound(runtime: Runtime, texts: list[list[int]], full: list[Tensor], technique: str) -> None:
    kl, extra = 0.0, 0.0
    for ids, p in zip(texts, full, strict=True):
        q = laws(runtime, ids, f"kv.compress={technique}")
        assert torch.equal(q[:FIRST], p[:FIRST]), "nothing before the first cut is changed"
        kl += float((p.exp() * (p - q)).sum(-1)[FIRST:].mean()) / len(texts)
        extra += (loss(q, ids) - loss(p, ids)) / len(texts)
    ratio, most = BOUNDS[technique]
    assert math.exp(extra) <= ratio
    assert 0.001 < kl <= most
