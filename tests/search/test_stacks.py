"""Searches and contrasts over stacks that change the model's law: still what their rules make of that law.

The law along a given text is read from requests whose output is set beforehand, one for each text, on the same stack without a
search; what a search finds must be what the rule says of these laws, in small steps and with preemptions too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.exec.conftest import STORY, Bench, spec
from weft.core.request import State
from weft.exec.build import Runtime
from weft.exec.mirror import Mirrored
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.types import RequestSpec, SamplingSpec, TokenItem, Tokens

H2O = "kv.compress=h2o(heavy=12, recent=12, every=6, observe=8)"
STACKS: dict[str, Sequence[str]] = {
    "h2o": [H2O],
    "streaming_llm": ["kv.compress=streaming_llm(sinks=2, window=20, every=5)"],
    "int8": ["kv.store=int8"],
    "h2o and int8": [H2O, "kv.store=int8"],
    "flexprefill": ["attention=flexprefill(block=32, minimum=32, representatives=8)"],
    "hydragen": ["attention=hydragen"],
}
TIGHT: dict[str, Any] = {"max_rows": 48, "max_samples": 8}
LENGTH = 6


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


def along(
    runtime: Runtime, parts: Sequence[str], prompt: Sequence[int], texts: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Logits after prompt and text, for each text, as the stack computes them token by token."""
    found: dict[tuple[int, int], torch.Tensor] = {}

    def probe(sequence: Mirrored, output: int, logits: torch.Tensor) -> None:
        found[sequence.seed, output] = logits.clone()

    bench = Bench(runtime, techniques=parts)
    bench.executor.watch(probe)
    bench.run(
        [
            RequestSpec(
                id=i, items=(TokenItem(tuple(prompt)),), seed=i, forced=(*text, 0),
                sampling=SamplingSpec(temperature=0.0, max_tokens=len(text) + 1),
            )
            for i, text in enumerate(texts)
        ]
    )  # fmt: skip
    return [found[i, len(text)] for i, text in enumerate(texts)]


def disturb(bench: Bench) -> None:
    """Somebody is computed anew, now and then; compressed prompts take many steps, so not too often."""
    running = list(bench.engine.scheduler.running.values())
    if bench.steps in (3, 20, 37, 60, 90) and running:
        bench.engine.scheduler.preempt(victim := running[bench.steps % len(running)])
        for r in [victim, *running]:
            if r.state is State.WAITING and r.rid not in bench.engine.scheduler.waiting:
                bench.engine.scheduler.enqueue(r, 0.0)


@pytest.mark.parametrize("name", STACKS)
def test_beams_over_the_stacks_own_law(runtime: Runtime, ids: list[int], name: str) -> None:
    parts, prompt, width = STACKS[name], ids[:70], 3
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(LENGTH):
        laws = [torch.log_softmax(x, -1) for x in along(runtime, parts, prompt, [t for _, t in live])]
        ahead = [
            (total + float(p), [*text, int(t)])
            for (total, text), law in zip(live, laws, strict=True)
            for p, t in zip(*law.topk(width), strict=True)
        ]
        live = sorted(ahead, key=lambda x: -x[0])[:width]
    wanted = [text for _, text in live]
    for limits, each in (({}, None), (TIGHT, disturb)):
        bench = Bench(runtime, techniques=[*parts, f"search=beam(width={width})"], **limits)
        out = bench.run([spec(1, prompt, n=width, max_tokens=LENGTH)], each=each)
        assert [out[1, i] for i in range(width)] == wanted
        assert bench.engine.stats.preemptions > 0 or each is None


@pytest.mark.parametrize("name", STACKS)
def test_a_contrast_of_the_stacks_own_laws(runtime: Runtime, ids: list[int], name: str) -> None:
    """Each context is compressed, cut in tiles and stored by its own length."""
    parts, own, other = STACKS[name], ids[:90], ids[60:97]
    law: dict[str, Any] = {"temperature": 0.0, "max_tokens": LENGTH}
    one = spec(1, own, **law)
    asked = RequestSpec(id=1, items=one.items, sampling=one.sampling, n=2, companions=((TokenItem(tuple(other)),),))
    out = Bench(runtime, techniques=[*parts, "sample=cad(alpha=0.8)"]).run([asked])
    texts = [out[1, 0][:i] for i in range(LENGTH)]
    pairs = zip(along(runtime, parts, own, texts), along(runtime, parts, other, texts), strict=True)
    assert [int((1.8 * a - 0.8 * b).argmax()) for a, b in pairs] == out[1, 0]
    assert out[1, 1] == out[1, 0], "greedy, and so is the second sequence with a companion of its own"
    plain = Bench(runtime, techniques=parts).run([one])
    assert plain[1, 0] != out[1, 0]
    disturbed = Bench(runtime, techniques=[*parts, "sample=cad(alpha=0.8)"], **TIGHT)
    assert disturbed.run([asked], each=disturb) == out


@pytest.mark.parametrize("name", ["h2o", "h2o and int8", "flexprefill"])
def test_candidates_over_a_stack_are_those_of_an_ordinary_request(runtime: Runtime, ids: list[int], name: str) -> None:
    law: dict[str, Any] = {"temperature": 0.9, "max_tokens": 10, "logprobs": 0}
    plain = Bench(runtime, techniques=STACKS[name])
    plain.run([spec(1, ids[:70], n=4, seed=8, **law)])
    drawn: dict[int, list[tuple[int, float]]] = {}
    for e in plain.events:
        if isinstance(e, Tokens):
            drawn.setdefault(e.index, []).extend((x.token, x.logprob) for x in e.logprobs)
    best = max(drawn.values(), key=lambda x: sum(p for _, p in x))
    bench = Bench(runtime, techniques=[*STACKS[name], "search=best_of_n(n=4)"], **TIGHT)
    assert bench.run([spec(1, ids[:70], seed=8, **law)], each=disturb)[1, 0] == [t for t, _ in best]
