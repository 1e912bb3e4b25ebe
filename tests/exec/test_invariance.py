"""A seed means the same tokens whatever else happens: batch, chunks, cache, preemption, drafts, policy, layers."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import msgspec
import numpy as np
import pytest

from tests.exec.conftest import STORY, Bench, spec
from weft.exec.build import Runtime
from weft.exec.thread import step
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.schedule.fcfs import FCFS
from weft.slots import Ask, Forward, Guesses, Quota, RequestView, StepView
from weft.traits import Traits
from weft.types import RequestSpec

COUNT = 100
Tokens_ = dict[tuple[int, int], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallChunks(FCFS):
    """FCFS whose prompts advance by at most `rows` rows in a step."""

    rows: int = 1
    traits: ClassVar[Traits] = Traits()

    def quota(self, request: RequestView, step: StepView) -> Quota:
        return Quota(min(step.rows_left, self.rows))


@pytest.fixture(scope="module")
def specs() -> list[RequestSpec]:
    """Prompts of 3 to 130 tokens of prose, half of them with a common beginning; greedy and sampled in turn."""
    ids = Tokenizer.load(resolve(None)).encode(STORY, add_special=False)
    rng = random.Random(5)
    out = []
    for i in range(COUNT):
        length = rng.choice((3, 7, 16, 17, 33, 48, 70, 100, 129))
        start = 0 if i % 2 else rng.randrange(len(ids) - length)
        law = {"temperature": 0.0} if i % 5 == 0 else {"temperature": 0.8, "top_p": rng.choice((1.0, 0.95))}
        out.append(spec(i, ids[start : start + length], seed=1000 + i, max_tokens=10 if length < 90 else 20, **law))
    return out


@pytest.fixture(scope="module")
def alone(
    runtime: Runtime, specs: Sequence[RequestSpec], tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Tokens_:
    """Every request alone in its engine: what all the other tests compare with.  Workers of one run share the answers."""
    base = tmp_path_factory.getbasetemp()
    kept = (base if worker_id == "master" else base.parent) / "alone.json"
    if kept.exists():
        return {(i, 0): tokens for i, tokens in enumerate(json.loads(kept.read_text()))}
    found: Tokens_ = {}
    for one in specs:
        found.update(Bench(runtime, share=False).run([one]))
    draft = kept.with_name(f"alone-{worker_id}.json")
    draft.write_text(json.dumps([found[i, 0] for i in range(COUNT)]))
    draft.replace(kept)
    return found


@pytest.mark.parametrize("others", [7, 63])
def test_in_company(runtime: Runtime, specs: list[RequestSpec], alone: Tokens_, others: int) -> None:
    bench = Bench(runtime, share=False, max_num_seqs=others + 1, max_samples=64)
    assert bench.run(specs) == alone


@pytest.mark.parametrize("rows", [1, 16, 512])
def test_in_chunks(runtime: Runtime, specs: list[RequestSpec], alone: Tokens_, rows: int) -> None:
    bench = Bench(runtime, share=False, policy=SmallChunks(rows=rows))
    assert bench.run(specs) == alone


def test_from_a_cached_prefix(runtime: Runtime, specs: list[RequestSpec], alone: Tokens_) -> None:
    bench = Bench(runtime)
    assert bench.run(specs) == alone
    again = [RequestSpec(id=s.id + COUNT, items=s.items, sampling=s.sampling, seed=s.seed) for s in specs]
    hits = bench.engine.stats.prefix_hit_tokens
    second = bench.run(again)
    assert bench.engine.stats.prefix_hit_tokens - hits > 3000
    assert {k: second[k[0] + COUNT, k[1]] for k in alone} == alone


def test_after_preemption(runtime: Runtime, specs: list[RequestSpec]) -> None:
    """Short prompts that grow into each other until a pool of 24 blocks is too small for them."""
    grow = [
        msgspec.structs.replace(s, sampling=msgspec.structs.replace(s.sampling, max_tokens=60))
        for s in specs[:30]
        if s.items[0].rows < 40
    ]
    wanted: Tokens_ = {}
    for one in grow:
        wanted.update(Bench(runtime, share=False).run([one]))
    for share in (False, True):
        bench = Bench(runtime, blocks=24, max_guesses=0, share=share)
        assert bench.run(grow) == wanted
        assert bench.engine.stats.preemptions >= 5


def test_forced_preemption_at_every_step(runtime: Runtime, specs: list[RequestSpec], alone: Tokens_) -> None:
    rng = random.Random(1)

    def disturb(bench: Bench) -> None:
        scheduler = bench.engine.scheduler
        if bench.steps < 60 and scheduler.running:
            victim = rng.choice(list(scheduler.running.values()))
            scheduler.preempt(victim)
            scheduler.enqueue(victim, 0.0)

    bench = Bench(runtime, share=True)
    assert bench.run(specs[:40], disturb) == {k: v for k, v in alone.items() if k[0] < 40}
    assert bench.engine.stats.preemptions > 10


@pytest.mark.parametrize("policy", ["prefill_first", "layered(groups=3,least=8)"])
def test_under_other_policies(layered_runtime: Runtime, specs: list[RequestSpec], alone: Tokens_, policy: str) -> None:
    bench = Bench(layered_runtime, techniques=[f"schedule={policy}"])
    assert bench.run(specs) == alone


class Skilled:
    """A draft that knows the answers, and says them with probability `skill`."""

    model = None
    guesses = 4

    def __init__(self, truth: list[list[int]], skill: float) -> None:
        self.truth = {tuple(t[:3]): t for t in truth}
        self.skill, self.rng, self.proposed, self.accepted = skill, random.Random(2), 0, 0

    def propose(self, asks: Sequence[Ask], run: Forward | None) -> list[Guesses]:
        return [Guesses(self.say(ask.context)) for ask in asks]

    def say(self, context: np.ndarray) -> list[int]:
        rest = self.truth[tuple(context[:3].tolist())][len(context) :][:4]
        return [t if self.rng.random() < self.skill else (t + 1) % 4096 for t in rest]

    def observe(self, proposed: int, accepted: int) -> None:
        self.proposed += proposed
        self.accepted += accepted


@pytest.mark.parametrize("skill", [0.0, 0.6, 1.0])
def test_with_drafts(runtime: Runtime, specs: list[RequestSpec], alone: Tokens_, skill: float) -> None:
    """The answers are those without guesses, in fewer steps where guesses are right."""
    chosen = {tuple(prompt(s)[:3]): s for s in specs}.values()
    draft = Skilled([[*prompt(s), *alone[s.id, 0]] for s in chosen], skill)
    bench = Bench(runtime, draft=draft)
    assert bench.run(list(chosen)) == {(s.id, 0): alone[s.id, 0] for s in chosen}
    assert draft.proposed > 100
    assert (draft.accepted > 0) == (skill > 0)
    plain = Bench(runtime)
    plain.run(list(chosen))
    if skill == 1.0:
        assert draft.accepted == draft.proposed
        assert bench.steps < 0.5 * plain.steps


def prompt(spec: RequestSpec) -> list[int]:
    return [t for item in spec.items for t in getattr(item, "ids", ())]


def test_sequences_of_one_request_share_the_prompt(runtime: Runtime, specs: list[RequestSpec]) -> None:
    """n = 4 gives what four requests with the children's seeds give, over one copy of the prompt's KV."""
    from weft.core.noise import child_seed

    ids = [t for item in specs[1].items for t in getattr(item, "ids", ())] * 2
    law = {"temperature": 1.0, "max_tokens": 12}
    bench = Bench(runtime, share=False)
    most = 0

    def watch(b: Bench) -> None:
        nonlocal most
        most = max(most, b.engine.pool.referenced)

    together = bench.run([spec(1, ids, seed=77, n=4, **law)], watch)
    single = Bench(runtime, share=False).run([spec(i, ids, seed=child_seed(77, i), **law) for i in range(4)])
    assert [together[1, i] for i in range(4)] == [single[i, 0] for i in range(4)]
    assert len({tuple(v) for v in together.values()}) > 1
    full = len(ids) // 16
    assert most <= full + 4 * 2


def test_cancelled_neighbours_leave_no_trace(runtime: Runtime, specs: list[RequestSpec], alone: Tokens_) -> None:
    bench = Bench(runtime)
    for one in specs:
        bench.engine.add(one, 0.0)
    keep = {s.id for s in specs if s.id % 3 == 0}
    found: dict[tuple[int, int], list[int]] = {}
    rng = random.Random(3)
    doomed = [s.id for s in specs if s.id not in keep]
    while bench.engine.has_work:
        plan, _ = bench.engine.schedule(0.0)
        result = bench.executor.execute(plan)
        if doomed and rng.random() < 0.7:
            bench.engine.cancel(doomed.pop(rng.randrange(len(doomed))))
        for event in bench.engine.commit(0.0, plan, result):
            if getattr(event, "tokens", None) and event.id in keep:
                found.setdefault((event.id, event.index), []).extend(event.tokens)
        bench.engine.check()
    assert found == {k: v for k, v in alone.items() if k[0] in keep}
    assert bench.engine.pool.referenced == 0


def test_a_step_on_an_idle_engine_is_harmless(runtime: Runtime) -> None:
    bench = Bench(runtime)
    assert step(bench.engine, bench.executor)[0] == []
