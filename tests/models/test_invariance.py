"""In the invariant mode a row's logits have the same bits in any company, in any chunks, and from any cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.harness import Bench, Rows, bench_for
from weft.models import load_spec
from weft.models.families import read
from weft.models.spec import DecoderSpec
from weft.types import GroupKind

pytestmark = pytest.mark.usefixtures("ops")


def tokens_of(vocab: int, length: int, seed: int) -> list[int]:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole(bench: Bench, name: str, tokens: list[int]) -> Tensor:
    return bench.run([Rows(name, tokens, 0)])[0]


def check(bench: Bench, length: int) -> None:
    """One sequence of `length` tokens, alone, chunked, from a shared prefix, and in uneven chunks among others."""
    vocab, rng = bench.decoder.spec.vocab, random.Random(3)
    tokens = tokens_of(vocab, length, 1)
    reference = whole(bench, "whole", tokens)
    for chunk in (1, 5, 16, 512):
        part = tokens if chunk != 1 else tokens[:60]
        assert torch.equal(bench.chunked(f"by{chunk}", part, chunk), reference[: len(part)]), chunk
    # A cached prefix, continued in one piece and row by row.
    unit = max(group.block_tokens for group in bench.groups if group.kind is not GroupKind.PARKED)
    cached = length // 2 // unit * unit
    assert cached
    bench.share("whole", "one", cached)
    assert torch.equal(bench.run([Rows("one", tokens[cached:], cached)])[0], reference[cached:])
    bench.share("whole", "rows", cached)
    assert torch.equal(bench.chunked("rows", tokens[: cached + 9], 1, cached), reference[cached : cached + 9])
    # Company: seven others, each at its own pace, some decoding while others prefill.
    names = [f"n{i}" for i in range(7)]
    others = {name: tokens_of(vocab, rng.randrange(20, length), 10 + i) for i, name in enumerate(names)}
    others["mine"] = tokens
    done = dict.fromkeys(others, 0)
    seen: dict[str, list[Tensor]] = {name: [] for name in others}
    while any(done[name] < len(others[name]) for name in others):
        works = []
        for name in rng.sample(sorted(others), len(others)):
            count = min(rng.choice((1, 1, 3, 17, 40)), len(others[name]) - done[name])
            if count:
                works.append(Rows(name, others[name][done[name] : done[name] + count], done[name]))
                done[name] += count
        for work, logits in zip(works, bench.run(works), strict=True):
            seen[work.name].append(logits)
    assert torch.equal(torch.cat(seen["mine"]), reference)
    for name in names[:2]:
        assert torch.equal(torch.cat(seen[name]), whole(bench, name + "/alone", others[name])), name


def test_bundled_model(shared: Callable[[str], Path]) -> None:
    folder = shared("models/tiny")
    check(bench_for(load_spec(folder), folder, blocks=700), 200)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_with_two_threads(two_threads: None) -> None:
    """Two threads split products by other shapes than one; short, since threads wait for each other on a busy machine."""
    spec = odd(hidden_size=256, intermediate_size=768, num_hidden_layers=1, num_key_value_heads=5, head_dim=64)
    bench = bench_for(spec, "random")
    tokens = tokens_of(301, 100, 1)
    reference = whole(bench, "whole", tokens)
    assert torch.equal(bench.chunked("by16", tokens, 16), reference)
    assert torch.equal(bench.chunked("by1", tokens[:5], 1), reference[:5])


def odd(**changes: Any) -> DecoderSpec:
    base = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 301,
        "hidden_size": 44,
        "intermediate_size": 75,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "max_position_embeddings": 4096,
    }
    return read({**base, **changes})


ODD: dict[str, tuple[DecoderSpec, int]] = {
    "multi_query": (odd(), 16),
    "no_grouping": (odd(num_attention_heads=3, num_key_value_heads=3, head_dim=20, attention_bias=True), 8),
    "wide_head": (odd(num_attention_heads=2, num_key_value_heads=2, head_dim=128, hidden_size=97), 32),
    "window": (odd(architectures=["MistralForCausalLM"], sliding_window=37), 16),
    "mixed_windows": (
        odd(architectures=["Gemma2ForCausalLM"], sliding_window=50, query_pre_attn_scalar=10, num_attention_heads=4),
        16,
    ),
    "experts": (
        odd(
            architectures=["Qwen3MoeForCausalLM"],
            num_experts=7,
            num_experts_per_tok=3,
            moe_intermediate_size=30,
            num_attention_heads=6,
            num_key_value_heads=2,
            norm_topk_prob=True,
        ),
        16,
    ),
    "small_blocks": (odd(num_attention_heads=4, num_key_value_heads=2, head_dim=16), 1),
    "odd_blocks": (odd(num_attention_heads=4, num_key_value_heads=2, head_dim=16), 24),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_models(name: str) -> None:
    spec, block_tokens = ODD[name]
    bench = bench_for(spec, "random", block_tokens=block_tokens, blocks=12000 // max(block_tokens, 4), seed=4)
    for tensor in bench.decoder.tensors.values():  # peaked attention: differences in any entry show
        if tensor.dim() == 2 and tensor.shape[0] > tensor.shape[1] and tensor.shape[0] != spec.vocab:
            tensor.mul_(1.5)
    check(bench, 192)


def test_long_context_spans_several_groups_of_key_tiles() -> None:
    """2,500 entries: three groups of key tiles, and slabs that split them; chunks of 512 and of 7 agree at the end."""
    bench = bench_for(ODD["multi_query"][0], "random", blocks=1500)
    tokens = tokens_of(301, 2500, 2)
    long = bench.chunked("long", tokens, 512)
    bench.share("long", "tail", 2400)
    assert torch.equal(bench.chunked("tail", tokens, 7, 2400), long[2400:])
    bench.share("long", "rows", 2480)
    assert torch.equal(bench.chunked("rows", tokens[:2490], 1, 2480), long[2480:2490])


def test_the_fast_mode_is_what_it_says() -> None:
    """The other mode agrees closely, and not in every bit: the test above would see a difference."""
    spec = ODD["multi_query"][0]
    exact, fast = (bench_for(spec, "random", invariant=invariant, blocks=200) for invariant in (True, False))
    tokens = tokens_of(301, 150, 5)
    one, rows = whole(fast, "a", tokens), fast.chunked("b", tokens, 1)
    assert not torch.equal(one, rows)
    assert (one - rows).abs().max() < 1e-4
    assert (one - whole(exact, "a", tokens)).abs().max() < 1e-4
