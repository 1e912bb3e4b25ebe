"""Drafts that guess from what was said: equal tokens under every law and disturbance, on plain operations and on the kernels."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from tests.draft.test_speculative_sampling import LAWS, told
from tests.exec.conftest import STORY, Bench, spec
from weft import LLM, SamplingParams
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.types import RequestSpec

DRAFTS = {
    "trie": "draft=trie(shortest=1, share=0.2)",
    "hierarchy": "draft=hierarchy(shortest=1)",
    "jacobi": "draft=jacobi(window=4)",
}


@pytest.fixture(scope="module", params=[pytest.param("ref", marks=pytest.mark.long), "cpu"])
def machine(request: pytest.FixtureRequest) -> Runtime:
    config = EngineConfig(
        model=resolve(None),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=32,
        device="cpu",
        threads=1,
        ops=request.param,
    )
    return build(prepare(config))


@pytest.fixture(scope="module")
def specs() -> list[RequestSpec]:
    """40 requests under every law, some that quote themselves, some with several sequences, of two tenants."""
    ids = Tokenizer.load(resolve(None)).encode(STORY, add_special=False)
    rng = random.Random(3)
    out = []
    for i in range(40):
        length = rng.choice((3, 17, 48, 70))
        start = 0 if i % 3 == 0 else rng.randrange(len(ids) - length)
        own = ids[start : start + length]
        prompt = own + own[: length // 2] if i % 2 else own
        n, law = 2 if i % 12 == 5 else 1, LAWS[i % 8]
        out.append(spec(i, prompt, seed=i, n=n, salt=b"ab"[i % 2 :][:1], max_tokens=rng.choice((9, 30)), **law))
    return out


@pytest.fixture(scope="module")
def plain(machine: Runtime, specs: list[RequestSpec]) -> Bench:
    bench = Bench(machine)
    bench.run(specs)
    return bench


@pytest.mark.parametrize(
    "limits", [{}, {"max_guesses": 2, "max_num_seqs": 7, "max_rows": 40, "max_samples": 14}], ids=["", "small"]
)
@pytest.mark.parametrize("draft", DRAFTS)
def test_equal_tokens_and_logprobs(
    machine: Runtime, plain: Bench, specs: list[RequestSpec], draft: str, limits: dict[str, int]
) -> None:
    """Twice, the second time with prefix hits and whatever the draft has learnt."""
    bench = Bench(machine, techniques=[DRAFTS[draft]], **limits)
    wanted = plain.run([])
    for _ in range(2):
        assert bench.run(specs) == wanted
        assert told(bench) == told(plain)
        bench.events.clear()
    acts = bench.engine.stack["draft"].acts
    assert acts["proposed"] > acts["accepted"] > 30
    assert bench.engine.stats.prefix_hit_tokens > 0
    assert limits or draft == "jacobi" or bench.steps < 2 * plain.steps


@pytest.mark.parametrize("draft", DRAFTS)
def test_alone_and_preempted(machine: Runtime, plain: Bench, specs: list[RequestSpec], draft: str) -> None:
    rng, wanted = random.Random(1), plain.run([])

    def disturb(bench: Bench) -> None:
        scheduler = bench.engine.scheduler
        if bench.steps < 60 and scheduler.running:
            victim = rng.choice(list(scheduler.running.values()))
            scheduler.preempt(victim)
            scheduler.enqueue(victim, 0.0)

    bench = Bench(machine, techniques=[DRAFTS[draft]])
    assert bench.run(specs[:20], disturb) == {key: tokens for key, tokens in wanted.items() if key[0] < 20}
    assert bench.engine.stats.preemptions > 10
    for one in specs[::13]:
        found = Bench(machine, techniques=[DRAFTS[draft]], share=False).run([one])
        assert found == {key: wanted[key] for key in found}


@pytest.fixture(scope="module")
def told_plainly() -> list[list[str]]:
    return list(answers(LLM(device="cpu", threads=1, max_model_len=512)))


def answers(llm: Any) -> Iterator[list[str]]:
    """What is said under stop strings, and under grammars; each twice, so that a draft may have learnt it."""
    prompts = [STORY[:200], STORY[:200] + STORY[:120], "Once upon a time"]
    schema = {"type": "object", "properties": {"name": {"enum": ["ferry", "lantern"]}, "years": {"type": "integer"}}}
    schema |= {"required": ["name", "years"], "additionalProperties": False}
    laws: list[dict[str, Any]] = [
        {"stop": ["he", " was"], "max_tokens": 40},
        {"structured_outputs": {"json": schema}, "max_tokens": 60},
        {"structured_outputs": {"regex": "([a-z]{1,6} ){3,9}"}, "max_tokens": 40, "temperature": 0.9},
    ]
    for law in laws * 2:
        given = SamplingParams(**{"temperature": 0.0, "seed": 3, **law})
        yield [out.outputs[0].text for out in llm.generate(prompts, given)]


@pytest.mark.parametrize("draft", DRAFTS)
def test_stop_strings_and_grammars(told_plainly: list[list[str]], draft: str) -> None:
    llm = LLM(device="cpu", threads=1, max_model_len=512, techniques=[DRAFTS[draft]], draft_control="off")
    assert list(answers(llm)) == told_plainly


def test_one_request_chooses_a_draft(machine: Runtime, specs: list[RequestSpec], plain: Bench) -> None:
    for draft in ("trie", "jacobi"):
        own = [msgspec.structs.replace(one, techniques=(DRAFTS[draft],)) for one in specs[:9]]
        bench = Bench(machine)
        assert bench.run(own) == {key: tokens for key, tokens in plain.run([]).items() if key[0] < 9}
        assert bench.engine.stacks.acts()[f"draft={draft}.accepted"] > 0
