"""Nobody gets stuck: the corners in which requests could wait for one another, or for room that never comes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.core.world import LAYERS, MAX_LEN, VOCAB, Executor, Going, groups, one_step, run, sequences_of
from weft.config import Limits, build_stack
from weft.core.engine import Engine
from weft.core.ledger import blocks_for
from weft.core.planning import Planning
from weft.slots import StepView
from weft.types import (
    Event,
    Finished,
    GroupSpec,
    MediaItem,
    Preempted,
    RequestSpec,
    SamplingSpec,
    TokenItem,
    Tokens,
    WorkResult,
)

POLICIES = ("fcfs", "prefill_first", "layered(groups=4, least=2)")


def spec(
    id: int, prompt: int, max_tokens: int, *, n: int = 1, priority: int = 0, prompt_logprobs: int = -1, kind: int = 1
) -> RequestSpec:
    ids = tuple((kind + 5 * i + i * i) % VOCAB for i in range(prompt))
    sampling = SamplingSpec(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
    return RequestSpec(id=id, items=(TokenItem(ids),), sampling=sampling, seed=id, n=n, priority=priority)


def make(
    blocks: int,
    *,
    policy: str = "fcfs",
    specs: Sequence[GroupSpec] | None = None,
    in_flight: int = 1,
    share: bool = True,
    draft: Any = None,
    **limits: int,
) -> tuple[Engine, Executor]:
    kinds = list(specs) if specs is not None else groups()
    bounds = Limits(**{"max_model_len": MAX_LEN, "max_num_seqs": 6, "max_rows": 8, "max_samples": 6, **limits})
    stack = build_stack([f"schedule={policy}"])
    if draft is not None:
        stack = replace(stack, instances={**stack.instances, "draft": draft})
    models = tuple(dict.fromkeys(g.model for g in kinds))
    engine = Engine(
        kinds, blocks, bounds, stack, models=models, layers=LAYERS, vocab=VOCAB, in_flight=in_flight, share=share
    )
    return engine, Executor(kinds, random.Random(0))


def expected(specs: Sequence[RequestSpec]) -> dict[tuple[int, int], list[int]]:
    out = {}
    for s in specs:
        for k, wanted in enumerate(sequences_of(s)):
            while wanted.reason is None:
                wanted.reason = wanted.take(wanted.token(), MAX_LEN)
            out[s.id, k] = wanted.output
    return out


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_a_pool_of_one_footprint_serves_full_length_requests(policy: str, rows: int) -> None:
    blocks = blocks_for(groups(), MAX_LEN, rows, layered=policy.startswith("layered"))
    specs = [spec(i, 10 + 20 * i, MAX_LEN, n=1 + (i == 1), kind=i) for i in range(3)]
    assert run(*make(blocks, policy=policy, max_rows=rows), specs) == expected(specs)
    engine, _ = make(blocks - 1, policy=policy, max_rows=rows)
    (refusal,) = engine.add(specs[0], 0.0)
    assert f"{blocks} KV blocks, but the pool has {blocks - 1}" in refusal.message  # type: ignore[union-attr]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_smallest_budgets_still_end(policy: str) -> None:
    specs = [spec(i, 7 + i, 6, n=1 + 2 * (i % 2), prompt_logprobs=i % 2 - 1) for i in range(6)]
    engine, executor = make(
        40, policy=policy, max_rows=1, max_samples=1, max_num_seqs=2, row_bytes=3, sample_bytes=5, work_bytes=8
    )
    assert run(engine, executor, specs) == expected(specs)


def test_a_full_pool_can_rewrite_what_only_the_index_names() -> None:
    """Taking back a token of a full table: the block to write over is cached, and there is no other."""
    specs = groups()[:1]
    engine, executor = make(MAX_LEN // 4, specs=specs)
    assert engine.add(spec(0, 60, MAX_LEN), 0.0) == []
    while len(engine.find(0).context) < MAX_LEN - 1:
        one_step(engine, executor, 0.0)
    engine.truncate(0, 60)
    engine.append(0, [1, 2, 3])
    assert engine.pool.available <= 1
    for now in range(20):
        one_step(engine, executor, float(now))
    assert not engine.has_work


def arrivals(
    engine: Engine, executor: Executor, big: int, small: list[RequestSpec], steps: int
) -> tuple[list[Event], int]:
    """One small request for each step; the events, and the step in which the big one ended (-1: it did not)."""
    events: list[Event] = []
    for now in range(steps):
        if small:
            assert engine.add(small.pop(), float(now)) == []
        found = one_step(engine, executor, float(now))
        events += found
        if any(isinstance(e, Finished) and e.id == big for e in found):
            return events, now
    return events, -1


@pytest.mark.parametrize("policy", POLICIES)
def test_a_stream_of_small_requests_starves_no_large_one(policy: str) -> None:
    """The large one needs most of the pool; each small one alone would always find room before it."""
    blocks = blocks_for(groups(), 58, 8, layered=policy.startswith("layered")) + 1
    engine, executor = make(blocks, policy=policy)
    assert engine.add(spec(0, 50, 8), 0.0) == []
    stream = [spec(i, 3, 9, kind=i % 7) for i in range(1, 300)]
    _, ended = arrivals(engine, executor, 0, stream, 290)
    assert 0 < ended < 200


def test_who_finds_no_room_closes_the_door() -> None:
    engine, executor = make(30)
    assert engine.add(spec(0, 9, 4), 0.0) == []
    one_step(engine, executor, 0.0)
    d = Planning.begin(StepView(1.0, 8, LAYERS, 1, 0), engine.limits)
    assert engine.scheduler._obtain(engine.find(0), lambda: 3, d)
    assert not d.closed
    assert not engine.scheduler._obtain(engine.find(0), lambda: 31, d)
    assert d.closed


def test_rows_between_layers_are_not_overtaken() -> None:
    """Five siblings begin to decode while a prompt stands between layers: it takes its rows first, they share the rest."""
    engine, executor = make(200, policy="layered(groups=4, least=4)", max_rows=6, max_num_seqs=8)
    assert engine.add(spec(0, 2, 20, n=5), 0.0) == []
    assert engine.add(spec(1, 24, 2, kind=3), 0.0) == []
    layers = []
    for now in range(4):
        for r in engine.requests():
            executor.salts[r.rid] = b""
        plan, _ = engine.schedule(float(now))
        layers.append([w.layers for w in plan.works if w.layers is not None])
        assert plan.rows == 6
        engine.commit(float(now), plan, executor.execute(plan))
    assert layers == [[(0, 1)], [(1, 2)], [(2, 3)], [(3, 4)]]


@pytest.mark.parametrize("policy", POLICIES)
def test_interleaved_links_in_a_tight_pool_end(policy: str) -> None:
    """Siblings arrive at one instant, so that their queue order interleaves two families, each as large as the pool."""
    blocks = 2 * blocks_for(groups(), 26, 8, layered=policy.startswith("layered"))
    engine, executor = make(blocks, policy=policy, share=False)
    assert engine.add(spec(0, 18, 8, n=4), 0.0) == []
    assert engine.add(spec(1, 20, 6), 0.0) == []
    while 3 not in {r.index for r in engine.requests()}:
        one_step(engine, executor, 0.0)
    engine.link([(0, 0), (0, 2)])
    engine.link([(0, 1), (0, 3)])
    engine.scheduler.restart(engine.find(0, 3), 0.0)
    engine.scheduler.restart(engine.find(0, 0), 0.0)
    tokens: dict[tuple[int, int], list[int]] = {}
    for now in range(600):
        for event in one_step(engine, executor, float(now)):
            if isinstance(event, Tokens):
                tokens.setdefault((event.id, event.index), []).extend(event.tokens)
        if not engine.has_work:
            break
    assert not engine.requests()
    assert tokens[0, 0][:6] == tokens[0, 2][:6]
    assert tokens[0, 1][:6] == tokens[0, 3][:6]


def test_a_request_that_fails_before_its_siblings_live_ends_them_all() -> None:
    engine, executor = make(60)
    assert engine.add(spec(0, 9, 4, n=3), 0.0) == []
    plan, _ = engine.schedule(0.0)
    executor.salts[plan.works[0].request] = b""
    result = executor.execute(plan)
    failed = type(result)(step=plan.step, works=(WorkResult(rows=0, failed="no such thing"),))
    events = engine.commit(0.0, plan, failed)
    assert [(e.index, e.reason, e.error) for e in events if isinstance(e, Finished)] == [
        (k, "error", "no such thing") for k in range(3)
    ]
    assert not engine.requests()
    assert engine.pool.referenced == 0


def test_nobody_yields_for_room_that_a_commit_brings() -> None:
    """With a plan in flight, the blocks of whoever yields rest until it commits: one victim is enough."""
    engine, executor = make(20, specs=groups()[:1], in_flight=2, max_rows=3)
    for i in range(6):
        assert engine.add(spec(i, 3, 40, kind=i), 0.0) == []
    worst = 0
    for now in range(2000):
        for r in engine.requests():
            executor.salts[r.rid] = b""
        first, _ = engine.schedule(float(now))
        second, events = engine.schedule(float(now))
        worst = max(worst, sum(isinstance(e, Preempted) for e in events))
        for plan in (first, second):
            engine.commit(float(now), plan, executor.execute(plan))
        engine.check()
        if not engine.has_work:
            break
    assert not engine.requests()
    assert worst <= 1
    assert engine.stats.preemptions > 0


def test_a_prompt_that_becomes_plain_text_needs_no_more_room() -> None:
    """A draft does not follow a prompt with an item that is no text, and does not begin to when the item is cut away."""
    kinds = groups(models=2)
    blocks = blocks_for([g for g in kinds if g.model == "target"], MAX_LEN, 8)
    engine, executor = make(blocks, specs=kinds, draft=Going())
    items = (TokenItem((1, 2, 3, 4)), MediaItem(kind="image", rows=2, digest=b"1234"), TokenItem((5, 6)))
    given = RequestSpec(id=0, items=items, sampling=SamplingSpec(max_tokens=MAX_LEN), seed=0)
    assert engine.add(given, 0.0) == []
    one_step(engine, executor, 0.0)
    engine.truncate(0, 4)
    run(engine, executor, [], most=200)
