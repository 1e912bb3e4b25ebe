"""Drafts that guess from what was said: equal tokens under every law and disturbance, on plain operations and on the kernels."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.draft.test_speculative_sampling import LAWS, told
from tests.exec.conftest import STORY, Bench, spec
from weft import LLM, SamplingParams
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.registry import parse
from weft.types import Plan, RequestSpec, StepResult

DRAFTS = {
    "trie": "draft=trie(shortest=1, share=0.2)",
    "hierarchy": "draft=hierarchy(shortest=1)",
    "jacobi": "draft=jacobi(window=4)",
    "clover": "draft=clover",
    "clover that learns": "draft=clover(online=3)",
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
    """28 requests under every law, some that quote themselves, some with several sequences, of two tenants."""
    ids = Tokenizer.load(resolve(None)).encode(STORY, add_special=False)
    rng = random.Random(3)
    out = []
    for i in range(28):
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


@pytest.mark.parametrize("draft", ["trie", "hierarchy"])
def test_answers_are_learnt_to_their_end_also_where_nothing_may_be_guessed(machine: Runtime, draft: str) -> None:
    """As the controller has it: no guesses are wanted.  The same question again is then answered from what was said."""
    bench = Bench(machine, techniques=[f"draft={draft}"])
    inner = bench.executor.execute

    def silent(plan: Plan) -> StepResult:
        return inner(msgspec.structs.replace(plan, works=[msgspec.structs.replace(w, want=0) for w in plan.works]))

    bench.executor.execute = silent  # type: ignore[method-assign]
    asked = spec(1, range(300, 340), max_tokens=40, seed=7, temperature=0.9)
    said = bench.run([asked])[1, 0]
    part: Any = bench.engine.stack["draft"]
    acts, before = part.acts, bench.steps
    assert acts["proposed"] == 0
    kept = part._answers[b""]
    assert kept.below(said[-3:]) if draft == "trie" else kept[tuple(said[-3:-1])] == (said[-1],)
    bench.executor.execute = inner  # type: ignore[method-assign]
    found = bench.run([msgspec.structs.replace(asked, id=2)])
    assert found[2, 0] == said
    assert acts["accepted"] > 25
    assert bench.steps - before < 15


Answer = tuple[str, int, str]
STOPS = ["ferry-tree", "country to be", " veil"]


@pytest.fixture(scope="module")
def told_plainly() -> list[list[Answer]]:
    """Without a draft.  All answers end where they are asked to, and late enough for guesses."""
    with LLM(device="cpu", threads=1, max_model_len=512) as llm:
        found = list(answers(llm))
    assert all(reason == "stop" and count > 12 for some in found for _, count, reason in some)
    return found


def answers(llm: Any) -> Iterator[list[Answer]]:
    """(text, tokens, why it ended) under stop strings, and under grammars; each twice, so that a draft may have learnt it."""
    prompts = [STORY[:200], STORY[:200] + STORY[:120], "Once upon a time"]
    schema = {"type": "object", "properties": {"name": {"enum": ["ferry", "lantern"]}, "years": {"type": "integer"}}}
    schema |= {"required": ["name", "years"], "additionalProperties": False}
    laws: list[dict[str, Any]] = [
        {"stop": STOPS, "max_tokens": 60},
        {"structured_outputs": {"json": schema}, "max_tokens": 60},
        {"structured_outputs": {"regex": "([a-z]{1,6} ){3,9}"}, "max_tokens": 40, "temperature": 0.9},
    ]
    for law in laws * 2:
        given = SamplingParams(**{"temperature": 0.0, "seed": 3, **law})
        yield [
            (o.text, len(o.token_ids), o.finish_reason) for o in (x.outputs[0] for x in llm.generate(prompts, given))
        ]


@pytest.mark.parametrize("draft", [*DRAFTS, "hierarchy with a text", "vocabtrim"])
def test_stop_strings_and_grammars(told_plainly: list[list[Answer]], draft: str, tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    read = {"hierarchy with a text": f"draft=hierarchy(text='{path}')", "vocabtrim": f"draft=vocabtrim(text='{path}')"}
    parts = [{**DRAFTS, **read}[draft]]
    with LLM(device="cpu", threads=1, max_model_len=512, techniques=parts, draft_control="off") as llm:
        said = answers(llm)
        assert next(said) == told_plainly[0]
        assert llm._runtime is not None
        assert llm._runtime.engine.stats.acts[f"draft={parse(parts[0]).name}.accepted"] > 20, "before the stop strings"
        assert list(said) == told_plainly[1:]


def test_one_request_chooses_a_draft(machine: Runtime, specs: list[RequestSpec], plain: Bench) -> None:
    for draft in ("trie", "jacobi"):
        own = [msgspec.structs.replace(one, techniques=(DRAFTS[draft],)) for one in specs[:9]]
        bench = Bench(machine)
        assert bench.run(own) == {key: tokens for key, tokens in plain.run([]).items() if key[0] < 9}
        assert bench.engine.stacks.acts()[f"draft={draft}.accepted"] > 0
