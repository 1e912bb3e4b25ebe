"""A draft model: the rules by hand; live: equal tokens under every law and disturbance, and guesses that are the model's own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.exec.conftest import STORY, Bench, spec
from tests.exec.drafts import shallow, stranger
from weft.draft.speculative_sampling import SpeculativeSampling
from weft.errors import ConfigError
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.kvpool import KVPool
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.kv.store.int8 import Int8
from weft.models import load_spec
from weft.models.layout import workspace_bytes
from weft.models.spec import all_groups, kv_groups
from weft.registry import parse
from weft.slots import Ask
from weft.types import Plan, Rejected, RequestSpec, SamplingSpec, StepResult, TokenItem, TokenLogprob, Tokens

LAWS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.02},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 2},
    {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logprobs": 0},
    {"temperature": 0.6, "logit_bias": {310: 4.0, 17: -3.0}},
    {"temperature": 0.8, "stop_ids": (4, 13, 15, 262), "min_tokens": 6},
)


# ---------------------------------------------------------------------------------------------- by hand


class Scripted:
    """A second model that says `words` in turn; remembers what it was asked to compute."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self.words, self.passes, self.drawn = words, [], []  # type: ignore[var-annotated]

    def __call__(self, rows: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
        self.passes.append([(i, list(ids)) for i, ids in rows])
        return [i for i, _ in rows]

    def draw(self, rows: Sequence[tuple[int, Sequence[int]]], logits: list[int]) -> list[tuple[int, Any]]:
        assert logits == [i for i, _ in rows]
        self.drawn.append([(i, list(said)) for i, said in rows])
        return [(self.words[i][len(said)], torch.full((3,), float(len(said)))) for i, said in rows]


def ask(newest: int, most: int, **more: Any) -> Ask:
    return Ask(np.array([7, 8, newest]), 2, 1, most, SamplingSpec(stop_ids=(99,)), 5, **more)


def test_one_row_a_pass_for_whoever_still_guesses() -> None:
    """Ends: the length, what can be verified, an end id, logits that are no numbers; nobody is padded."""
    words = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 99, 1, 1], [3, -1, 0, 0], [0]]
    asks = [ask(10, 8), ask(11, 2), ask(12, 8), ask(13, 8, independent=True), ask(14, 0)]
    run, part = Scripted(words), SpeculativeSampling(guesses=3, model="x")
    found = part.propose(asks, run)
    assert [list(g.tokens) for g in found] == [[1, 2, 3], [5, 6], [9, 99], [3], []]
    assert run.passes == [
        [(0, [10]), (1, [11]), (2, [12]), (3, [13])],
        [(0, [1]), (1, [5]), (2, [9]), (3, [3])],
        [(0, [2])],
    ]
    assert run.drawn[2] == [(0, [1, 2])]
    assert [g.laws is None for g in found] == [True, True, True, False, True]
    assert found[3].laws.tolist() == [[0.0, 0.0, 0.0]]
    assert part.acts == {"proposed": 0, "accepted": 0, "draft_rows": 9}
    part.observe(3, 2)
    assert part.acts == {"proposed": 3, "accepted": 2, "draft_rows": 9}
    assert part.propose([], run) == []


def test_bass_by_hand() -> None:
    """Algorithm 1: +2 where some row took all; else -ceil(l / 10), one more after a shrink, at least 1 and what was taken."""
    part = SpeculativeSampling(guesses=7, model="x", adapt=True)
    assert (part.length, part.guesses) == (7, 32)
    lengths = []
    for seen in (
        [(7, 2), (7, 7)],  # one took all: 9
        [(9, 9)],  # 11
        [(11, 3), (11, 0)],  # 11 - 2
        [(9, 1)],  # 9 - 1 - 1
        [(7, 6)],  # 7 - 1 - 1, but 6 were taken
        [(6, 6)],  # 8
        [(8, 0)],  # 8 - 1
        [(3, 3)],  # cut short by a budget: tells nothing
        [],
        [(3, 2), (7, 1)],  # 7 - 1 - 1
    ):
        for proposed, accepted in seen:
            part.observe(proposed, accepted)
        part.propose([], Scripted([]))
        lengths.append(part.length)
    assert lengths == [9, 11, 9, 7, 6, 8, 7, 7, 7, 5]
    for _ in range(20):
        part.observe(part.length, 0)
        part.propose([], Scripted([]))
    assert part.length == 1
    for _ in range(20):
        part.observe(part.length, part.length)
        part.propose([], Scripted([]))
    assert part.length == 32
    fixed = SpeculativeSampling(guesses=7, model="x")
    fixed.observe(7, 0)
    fixed.propose([], Scripted([]))
    assert (fixed.length, fixed.guesses) == (7, 7)


@pytest.mark.parametrize("text", ["guesses=0", "guesses=33", "model=''", "guesses='four'", "size=1"])
def test_wrong_arguments_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(f"draft=speculative_sampling({text})").build()


# ---------------------------------------------------------------------------------------------- the plan


def part_of(folder: Path, **arguments: Any) -> str:
    inside = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f"draft=speculative_sampling(model={str(folder)!r}{inside})"


def config(*techniques: str, **more: Any) -> EngineConfig:
    given = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 64, "device": "cpu", "threads": 1}
    return EngineConfig(model=resolve(None), techniques=techniques, **{**given, **more})


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shallow(tmp_path_factory.mktemp("near"))


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stranger(tmp_path_factory.mktemp("far"))


def test_the_memory_plan_has_both_models(near: Path) -> None:
    alone, both = prepare(config()).plan, prepare(config(part_of(near))).plan
    setup = prepare(config(part_of(near)))
    assert setup.draft is not None
    assert len(setup.draft.layers) == 7
    assert alone.draft_bytes == 0
    assert both.weights_bytes == alone.weights_bytes
    samples = setup.limits.max_samples
    assert samples == 64 * (1 + 4), "every sequence has its four guesses verified in one step"
    assert both.workspace_bytes == workspace_bytes(setup.spec, setup.dtype, setup.limits.max_rows, samples)
    assert both.kv_bytes_per_token == alone.kv_bytes_per_token * 15 // 8
    laws = 64 * 4 * 4096 * 4
    runtime = build(setup)
    assert runtime.draft is not None
    assert runtime.draft.weights_bytes + runtime.draft.workspace_bytes + laws == both.draft_bytes
    fixed = both.weights_bytes + both.draft_bytes + both.workspace_bytes + both.reserve_bytes
    assert both.total_bytes == fixed + both.kv_bytes


def test_models_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocabulary of 512 and the model one of 4096"):
        prepare(config(part_of(stranger(tmp_path, vocab=512))))
    with pytest.raises(ConfigError, match="there is no folder"):
        prepare(config("draft=speculative_sampling(model='./nowhere')"))


@pytest.mark.parametrize("store", [None, Int8()])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_groups_of_two_models_fit_one_pool(near: Path, far: Path, dtype: str, store: Int8 | None) -> None:
    """Blocks are whole rows of both; the target's hold as many entries as without a second model."""
    for folders in ((resolve(None), far), (far, resolve(None)), (near, far), (far, near)):
        target, draft = (load_spec(folder) for folder in folders)
        specs = {"target": target, "draft": draft}
        groups, block_bytes = all_groups(specs, dtype, 16, store)
        own, least = kv_groups(target, dtype, 16, store)
        assert groups[: len(own)] == own
        assert block_bytes >= least
        for g in groups[len(own) :]:
            assert g.model == "draft"
            assert g.block_tokens == block_bytes // g.entry_bytes >= 1
        pool = KVPool(groups, specs, blocks=3, block_bytes=block_bytes, dtype=getattr(torch, dtype), store=store)
        assert pool.block_bytes == block_bytes


# ---------------------------------------------------------------------------------------------- live


@pytest.fixture(scope="module")
def drafting(near: Path) -> Runtime:
    return build(prepare(config(part_of(near))))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


@pytest.fixture(scope="module")
def specs(ids: list[int]) -> list[RequestSpec]:
    """100 requests under every law, of 3 to 130 tokens, some with several sequences."""
    rng = random.Random(11)
    out = []
    for i in range(100):
        length = rng.choice((3, 9, 17, 30, 48, 70, 129))
        start = 0 if i % 3 == 0 else rng.randrange(len(ids) - length)
        n = 3 if i % 12 == 5 else 1
        out.append(spec(i, ids[start : start + length], seed=i, n=n, max_tokens=rng.choice((2, 9, 20)), **LAWS[i % 8]))
    return out


def told(bench: Bench) -> dict[tuple[int, int], list[TokenLogprob]]:
    out: dict[tuple[int, int], list[TokenLogprob]] = {}
    for event in bench.events:
        if isinstance(event, Tokens):
            out.setdefault((event.id, event.index), []).extend(event.logprobs)
    return out


class Watching:
    """Between an engine and its executor: what plans and results said of guesses."""

    def __init__(self, bench: Bench) -> None:
        self.inner, bench.executor = bench.executor, self  # type: ignore[assignment]
        self.accepted: list[set[int]] = []
        """How many guesses stood, in each step with guesses."""
        self.followed = 0
        """Rows that plans gave the draft model beside those that it goes ahead for."""
        self.guessed: list[tuple[list[int], SamplingSpec, tuple[int, ...]]] = []
        """(context, law, guesses that followed it)."""

    def execute(self, plan: Plan) -> StepResult:
        result = self.inner.execute(plan)
        pairs = list(zip(plan.works, result.works, strict=True))
        self.accepted.append({len(fact.tokens) - 1 for work, fact in pairs if work.guesses})
        self.followed += sum(len(work.tokens) for work in plan.works if work.model == "draft")
        for work, fact in pairs:
            if fact.draft:
                s = self.inner.mirror.sequences[work.request]
                known = [*s.tokens[: work.stop - work.guesses].tolist(), *fact.tokens]
                self.guessed.append((known, s.sampling, fact.draft))
        return result


@pytest.fixture(scope="module")
def plain(drafting: Runtime, specs: list[RequestSpec]) -> Bench:
    """The same requests without guesses."""
    bench = Bench(drafting)
    bench.run(specs)
    return bench


def tokens_of(bench: Bench) -> dict[tuple[int, int], list[int]]:
    return bench.run([])


@pytest.mark.parametrize(
    ("arguments", "limits"),
    [
        ({}, {}),
        ({"guesses": 7, "adapt": True}, {}),
        ({"guesses": 9}, {"max_guesses": 2, "max_num_seqs": 7, "max_rows": 40, "max_samples": 14}),
    ],
    ids=["plain", "adaptive", "small steps"],
)
def test_equal_tokens_and_logprobs(
    near: Path,
    drafting: Runtime,
    specs: list[RequestSpec],
    plain: Bench,
    arguments: dict[str, Any],
    limits: dict[str, int],
) -> None:
    bench = Bench(drafting, techniques=[part_of(near, **arguments)], **limits)
    seen = Watching(bench)
    assert bench.run(specs) == tokens_of(plain)
    assert told(bench) == told(plain)
    acts = bench.engine.stack["draft"].acts
    assert acts["draft_rows"] >= acts["proposed"] > acts["accepted"] > 50
    assert limits or bench.steps < plain.steps
    assert max(len(counts) for counts in seen.accepted) > 2, "sequences of one step accept different numbers"
    assert max(len(guesses) for _, _, guesses in seen.guessed) <= bench.engine.limits.max_guesses


def test_alone_as_among_others(near: Path, drafting: Runtime, specs: list[RequestSpec], plain: Bench) -> None:
    wanted = tokens_of(plain)
    for one in specs[::9]:
        found = Bench(drafting, techniques=[part_of(near)], share=False).run([one])
        assert found == {key: wanted[key] for key in found}
        assert len(found) == one.n


def test_preempted_at_every_step(near: Path, drafting: Runtime, specs: list[RequestSpec], plain: Bench) -> None:
    rng = random.Random(1)

    def disturb(bench: Bench) -> None:
        scheduler = bench.engine.scheduler
        if bench.steps < 60 and scheduler.running:
            victim = rng.choice(list(scheduler.running.values()))
            scheduler.preempt(victim)
            scheduler.enqueue(victim, 0.0)

    bench = Bench(drafting, techniques=[part_of(near)])
    found = bench.run(specs[:40], disturb)
    assert found == {key: tokens for key, tokens in tokens_of(plain).items() if key[0] < 40}
    assert bench.engine.stats.preemptions > 10
    assert bench.engine.stack["draft"].acts["accepted"] > 20


def test_where_memory_is_short(near: Path, drafting: Runtime, ids: list[int]) -> None:
    """A pool that few answers fill: sequences are preempted, drafts find no room, and all end as they should."""
    specs = [spec(i, ids[i : i + 6], seed=i, max_tokens=70, **LAWS[i % 7]) for i in range(10)]
    bench = Bench(drafting, techniques=[part_of(near)], blocks=24)
    assert bench.run(specs) == Bench(drafting).run(specs)
    assert bench.engine.stats.preemptions > 2
    assert bench.engine.stack["draft"].acts["accepted"] > 20


def test_a_draft_of_another_shape(far: Path, ids: list[int]) -> None:
    """Sliding windows, rows of other widths, a short context beyond which nothing is guessed; hardly a guess stands."""
    runtime = build(prepare(config(part_of(far))))
    specs = [spec(i, (ids * 2)[: 180 + 4 * i], seed=i, max_tokens=16, **LAWS[i % 8]) for i in range(8)]
    bench = Bench(runtime, techniques=[part_of(far)])
    seen = Watching(bench)
    assert bench.run(specs) == Bench(runtime).run(specs)
    assert bench.engine.stack["draft"].acts["proposed"] > 20
    assert 180 < max(len(context) + len(guesses) for context, _, guesses in seen.guessed) <= 192 + 1


@pytest.fixture(scope="module")
def alone(near: Path) -> Runtime:
    """The draft model as a model of its own."""
    return build(prepare(replace(config(), model=near)))


def check_guesses(seen: Watching, alone: Runtime) -> None:
    """Every greedy guess is what the draft model alone would say after the same text."""
    greedy = [(context, said) for context, law, said in seen.guessed if law.temperature == 0.0]
    assert len(greedy) > 30
    found = Bench(alone).run(
        [spec(i, context, max_tokens=len(said), temperature=0.0) for i, (context, said) in enumerate(greedy)]
    )
    assert [tuple(found[i, 0]) for i in range(len(greedy))] == [said for _, said in greedy]


def test_guesses_are_the_draft_model_s_own(near: Path, drafting: Runtime, ids: list[int], alone: Runtime) -> None:
    """After any acceptance and rejection its KV is that of the text: it goes on as it would alone from there."""
    bench = Bench(drafting, techniques=[part_of(near)], max_rows=40)
    seen = Watching(bench)
    bench.run([spec(i, ids[9 * i : 12 * i + 5], max_tokens=20, temperature=0.0) for i in range(9)])
    assert len({len(counts) for counts in seen.accepted}) > 1
    check_guesses(seen, alone)


@pytest.mark.parametrize(
    "part",
    [
        "kv.compress=streaming_llm(sinks=4, window=24, every=8)",
        "kv.compress=h2o(heavy=12, recent=12, every=8)",
        "attention=flexprefill(block=16, minimum=16, representatives=4)",
        "attention=hydragen",
        "skip=mue(after=(6,), threshold=0.9)",
        "kv.store=int8",
    ],
)
def test_techniques_of_the_target_leave_the_draft_alone(
    near: Path, drafting: Runtime, ids: list[int], alone: Runtime, part: str
) -> None:
    """Equal tokens with the technique and without guesses, and guesses from KV that the technique had no hand in."""
    stored = part.startswith("kv.store")
    runtime = build(prepare(config(part, part_of(near)))) if stored else drafting
    # Two key tiles in common for hydragen; what others leave in the index is what makes them so.
    common = (ids * 2)[: 130 if part.endswith("hydragen") else 40]
    prompts = [[*common, *ids[i : 62 + i]] for i in range(9)]
    specs = [
        spec(i, p, seed=i, max_tokens=24, temperature=0.8 * (i % 3 > 1), top_p=0.95) for i, p in enumerate(prompts)
    ]
    bench = Bench(runtime, techniques=[part, part_of(near)])
    bench.run([spec(99, common, max_tokens=1)])
    bench.events.clear()
    seen = Watching(bench)
    assert bench.run(specs) == Bench(runtime, techniques=[part], share=False).run(specs)
    acts = bench.engine.stats.acts
    assert acts["draft=speculative_sampling.accepted"] > 10
    own = {act: count for act, count in acts.items() if act.startswith(part.partition("(")[0])}
    assert own
    assert all(own.values()), own
    if not stored:  # there the draft's own KV is rounded too
        check_guesses(seen, alone)


@pytest.mark.parametrize("accept", ["race", "rejection"])
def test_a_draft_that_is_the_target_is_always_right(ids: list[int], accept: str) -> None:
    """Same law and, for the race, same noise: the guess is the token, under penalties and truncation too."""
    techniques = [part_of(resolve(None), guesses=5), f"accept={accept}"]
    runtime = build(prepare(config(*techniques, max_num_seqs=16)))
    bench = Bench(runtime, techniques=techniques)
    bench.run([spec(i, ids[i : i + 30], seed=i, max_tokens=13, **LAWS[i % 8]) for i in range(16)])
    acts = bench.engine.stack["draft"].acts
    assert acts["accepted"] == acts["proposed"] > 120


def test_each_model_has_prefix_hits_of_its_own(near: Path, drafting: Runtime, ids: list[int]) -> None:
    bench = Bench(drafting, techniques=[part_of(near)])
    seen = Watching(bench)
    bench.run([spec(0, ids[:120], max_tokens=4, temperature=0.0)])
    first, seen.followed = seen.followed, 0
    bench.run([spec(1, ids[:120], max_tokens=4, temperature=0.0)])
    assert first >= 120
    block = next(g.block_tokens for g in drafting.setup.groups if g.model == "draft")
    assert seen.followed == 120 - 120 // block * block


def test_layered_prompts_are_guessed_for(near: Path, ids: list[int]) -> None:
    techniques = ["schedule=layered(groups=3,least=8)", part_of(near)]
    runtime = build(prepare(config(*techniques, max_num_seqs=8)))
    specs = [spec(i, ids[i : i + 60], seed=i, max_tokens=12, **LAWS[i % 8]) for i in range(12)]
    bench = Bench(runtime, techniques=techniques)
    assert bench.run(specs) == Bench(runtime).run(specs)
    assert bench.engine.stack["draft"].acts["accepted"] > 10


# ---------------------------------------------------------------------------------------------- requests choose


def with_parts(one: RequestSpec, *parts: str) -> RequestSpec:
    return RequestSpec(**{f: getattr(one, f) for f in one.__struct_fields__} | {"techniques": parts})


def test_a_request_declines_or_chooses(near: Path, drafting: Runtime, specs: list[RequestSpec], plain: Bench) -> None:
    own = ["draft=none", "draft=ngram(shortest=1)", "draft=speculative_sampling(guesses=2)", part_of(near, guesses=6)]
    bench = Bench(drafting, techniques=[part_of(near)])
    found = bench.run([with_parts(one, *[own[i % 4]] * (i % 5 < 4)) for i, one in enumerate(specs[:50])])
    assert found == {key: tokens for key, tokens in tokens_of(plain).items() if key[0] < 50}
    acts = bench.engine.stacks.acts()
    assert acts["draft=ngram.proposed"] > 0
    assert acts["draft=speculative_sampling.accepted"] > 50
    quiet = Bench(drafting, techniques=[part_of(near)])
    seen = Watching(quiet)
    quiet.run([with_parts(one, "draft=none") for one in specs[:10]])
    assert seen.followed == 0, "the second model has nothing to do with a request that declines it"


def test_a_request_cannot_have_a_model_that_is_not_loaded(
    near: Path, far: Path, drafting: Runtime, runtime_alone: Runtime, ids: list[int]
) -> None:
    def refused(runtime: Runtime, server: list[str], part: str) -> str:
        bench = Bench(runtime, techniques=server)
        (event,) = bench.engine.add(with_parts(spec(0, ids[:5]), part), 0.0)
        assert isinstance(event, Rejected)
        return event.message

    assert "this server has loaded none" in refused(runtime_alone, [], "draft=speculative_sampling")
    assert "this server has loaded another one" in refused(drafting, [part_of(near)], part_of(far))


@pytest.fixture(scope="module")
def runtime_alone() -> Runtime:
    return build(prepare(config(max_num_seqs=4)))


def test_forks_share_what_the_draft_computed_of_the_prompt(near: Path) -> None:
    """The second model computes a prompt of 96 tokens once, not once for each of the twelve sequences."""
    runtime = build(prepare(config(part_of(near, guesses=2))))
    engine = runtime.engine
    law = SamplingSpec(temperature=0.8, max_tokens=4)
    engine.add(RequestSpec(id=1, items=(TokenItem(tuple(range(100, 196))),), sampling=law, n=12, seed=3), 0.0)
    rows = 0
    while engine.has_work:
        plan, _ = engine.schedule(0.0)
        rows += sum(len(w.tokens) for w in plan.works if w.model == "draft")
        engine.commit(0.0, plan, runtime.executor.execute(plan))
    assert 96 <= rows <= 96 + 12 * 4
    engine.check()
