"""Beside what changes the KV that is read: hydragen changes nothing, and flexprefill stays a function of the prompt."""

from __future__ import annotations

import pytest
import torch

from tests.exec.conftest import STORY, Bench, spec
from weft.exec.build import Runtime
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.types import RequestSpec

FLEX = "attention=flexprefill(block=32, minimum=32, representatives=8)"
OTHERS = {
    "streaming_llm": ("kv.compress=streaming_llm(sinks=4, window=150, every=40)",),
    "h2o": ("kv.compress=h2o(heavy=80, recent=80, every=40, observe=16)",),
    "h2o of all rows": ("kv.compress=h2o(heavy=80, recent=80, every=40, observe=None)",),
    "int8": ("kv.store=int8",),
    "int8 and h2o and drafts": ("kv.store=int8", "kv.compress=h2o(heavy=80, recent=80, every=40)", "draft=ngram"),
}


@pytest.fixture(scope="module")
def specs() -> list[RequestSpec]:
    ids = Tokenizer.load(resolve(None)).encode(STORY, add_special=False) * 4
    lengths = (256, 130, 17, 301)
    return [
        spec(i, ids[:n], seed=100 + i, n=1 + 2 * (i == 1), temperature=0.8, max_tokens=12)
        for i, n in enumerate(lengths)
    ]


def laws(bench: Bench, specs: list[RequestSpec]) -> dict[tuple[int, int], torch.Tensor]:
    found: dict[tuple[int, int], torch.Tensor] = {}
    bench.executor.watch(lambda s, output, logits: found.__setitem__((s.seed, output), logits.clone()))
    bench.run(specs)
    return found


def acts(bench: Bench, act: str) -> int:
    return bench.engine.stats.acts[f"attention={act}"]


@pytest.mark.parametrize("name", OTHERS)
def test_hydragen_changes_nothing(runtime: Runtime, specs: list[RequestSpec], name: str) -> None:
    plain = Bench(runtime, techniques=OTHERS[name])
    wanted = laws(plain, specs)
    bench = Bench(runtime, techniques=[*OTHERS[name], "attention=hydragen"])
    found = laws(bench, specs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert (
        acts(bench, "hydragen.entries_shared") > 0
    )  # compression gives each sequence blocks of its own: only before a cut


@pytest.mark.parametrize("name", OTHERS)
def test_flexprefill_is_a_function_of_the_prompt(runtime: Runtime, specs: list[RequestSpec], name: str) -> None:
    techniques, alone = [*OTHERS[name], FLEX], {}
    for one in specs:
        alone.update(laws(Bench(runtime, techniques=techniques, share=False), [one]))
    bench = Bench(runtime, techniques=techniques, max_rows=70)
    found = laws(bench, specs)
    assert found.keys() == alone.keys()
    assert all(torch.equal(found[k], alone[k]) for k in alone)
    assert acts(bench, "flexprefill.blocks_skipped") > 0
