"""Trees of guesses: tokens of plain decoding whatever the tree, on both kinds of operations and when memory is short."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.exec.conftest import STORY, Bench, spec
from weft.core.noise import side_seed
from weft.exec import sampler
from weft.exec.ahead import Ahead
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.gather import Gather
from weft.exec.mirror import Mirror
from weft.exec.reading import Read
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.slots import Ask, Forward, Guesses, candidates, line
from weft.types import Enter, Grant, Plan, RequestSpec, SamplingSpec, Tokens, Work, WorkResult

Answers = dict[tuple[int, int], list[int]]


class Bush:
    """A draft that knows the answers and hides them in trees: wrong branches, twins, and a right line that breaks off."""

    model = None
    guesses = 12

    def __init__(self, truth: Sequence[Sequence[int]], skill: float = 0.8) -> None:
        self.truth = {tuple(t[:3]): t for t in truth}
        self.skill, self.rng, self.proposed, self.accepted, self.moved = skill, random.Random(2), 0, 0, 0

    def propose(self, asks: Sequence[Ask], run: Forward | None) -> list[Guesses]:
        return [self.say(ask) for ask in asks]

    def say(self, ask: Ask) -> Guesses:
        rest = self.truth[tuple(ask.context[:3].tolist())][len(ask.context) :]
        tokens, parents, right = list[int](), list[int](), [-1]
        depth = {-1: 0}
        for j in range(min(ask.most, self.guesses)):
            goes_on = self.rng.random() < self.skill / 2 and len(right) <= len(rest)
            parent = right[-1] if goes_on else self.rng.randrange(-1, j)
            depth[j] = depth[parent] + 1
            tokens.append(rest[depth[j] - 1] if goes_on else self.rng.randrange(4096))
            parents.append(parent)
            if goes_on:
                right.append(j)
        return Guesses(tokens, parents=np.array(parents))

    def observe(self, proposed: int, accepted: int) -> None:
        self.proposed += proposed
        self.accepted += accepted


def prompt(one: RequestSpec) -> list[int]:
    return [t for item in one.items for t in getattr(item, "ids", ())]


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)


@pytest.fixture(scope="module")
def specs(ids: list[int]) -> list[RequestSpec]:
    laws: list[dict[str, object]] = [
        {"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 0.7, "repetition_penalty": 1.2},
        {"temperature": 1.0, "stop_ids": (4, 13, 15), "min_tokens": 5}, {"temperature": 0.0, "presence_penalty": 0.7},
    ]  # fmt: skip
    return [spec(i, ids[3 * i : 3 * i + 20 + 4 * i], seed=i, max_tokens=24, **laws[i % 5]) for i in range(15)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain_runtime() -> Runtime:
    given = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 32, "device": "cpu", "threads": 1}
    return build(prepare(EngineConfig(model=resolve(None), ops="ref", **given)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def alone(runtime: Runtime, specs: list[RequestSpec]) -> Answers:
    return Bench(runtime).run(specs)


def bushy(runtime: Runtime, specs: Sequence[RequestSpec], alone: Answers, **given: object) -> tuple[Bench, Bush]:
    draft = Bush([[*prompt(s), *alone[s.id, 0]] for s in specs])
    return Bench(runtime, draft=draft, **given), draft  # type: ignore[arg-type]


@pytest.mark.parametrize("ops", ["kernels", "plain"])
def test_trees_give_the_tokens_of_plain_decoding(
    request: pytest.FixtureRequest, ops: str, specs: list[RequestSpec], alone: Answers
) -> None:
    chosen: Runtime = request.getfixturevalue("runtime" if ops == "kernels" else "plain_runtime")
    some = specs if ops == "kernels" else specs[:5]
    bench, draft = bushy(chosen, some, alone)
    assert bench.run(some) == {k: v for k, v in alone.items() if k[0] < len(some)}
    assert draft.accepted > 0.1 * draft.proposed
    assert draft.proposed > 200


def test_in_chunks_and_when_memory_is_short(runtime: Runtime, specs: list[RequestSpec], alone: Answers) -> None:
    """Trees are cut where rows, samples or blocks run out; prompts come in pieces, and sequences are computed anew."""
    bench, draft = bushy(runtime, specs, alone, blocks=22, max_rows=40, max_samples=24)
    rng = random.Random(1)

    def disturb(bench: Bench) -> None:
        scheduler = bench.engine.scheduler
        if bench.steps % 3 == 0 and scheduler.running:
            victim = rng.choice(list(scheduler.running.values()))
            scheduler.preempt(victim)
            scheduler.enqueue(victim, 0.0)

    assert bench.run(specs, disturb) == alone
    assert bench.engine.stats.preemptions > 5
    assert draft.accepted > 0


def test_what_stands_is_shared_and_nothing_else(runtime: Runtime, specs: list[RequestSpec], alone: Answers) -> None:
    """Answers that were made of trees are found by the prefix index, and what was computed from them is right."""
    bench, draft = bushy(runtime, specs, alone)
    bench.run(specs)
    again = [spec(100 + s.id, [*prompt(s), *alone[s.id, 0]], max_tokens=8) for s in specs]
    draft.guesses = 0
    bench.events.clear()
    before = bench.engine.stats.prefix_hit_tokens
    assert bench.run(again) == Bench(runtime, share=False).run(again)
    assert bench.engine.stats.prefix_hit_tokens - before > 20 * len(again)


def test_logprobs_are_those_of_plain_decoding(runtime: Runtime, specs: list[RequestSpec], alone: Answers) -> None:
    told = [replaced(s) for s in specs]
    bench, _ = bushy(runtime, specs, alone)
    bench.run(told)
    plain = Bench(runtime)
    plain.run(told)
    mine, wanted = ({(k, i): p for k, i, p in logprobs(b)} for b in (bench, plain))
    assert mine.keys() == wanted.keys()
    assert max(abs(mine[k] - wanted[k]) for k in wanted) < 1e-4


def replaced(one: RequestSpec) -> RequestSpec:
    law = {f: getattr(one.sampling, f) for f in one.sampling.__struct_fields__} | {"logprobs": 1}
    fields = {f: getattr(one, f) for f in one.__struct_fields__} | {"sampling": SamplingSpec(**law)}
    return RequestSpec(**fields)


def logprobs(bench: Bench) -> list[tuple[int, int, float]]:
    seen: dict[int, int] = {}
    out = []
    for event in bench.events:
        if isinstance(event, Tokens):
            for told in event.logprobs:
                out.append((event.id, seen.setdefault(event.id, 0), told.logprob))
                seen[event.id] += 1
    return out


def test_a_second_model_grows_a_tree_in_passes(runtime: Runtime, ids: list[int]) -> None:
    """Logits after each guess are those of its own line computed as a chain, whatever was computed beside it."""
    prefix, tree = ids[:40], ((5, 9, 5), (-1, -1, 0), (7, 8, 9, 3), (2, 1, 2, -1), (11,), (3,))
    found = passes(runtime, prefix, tree)
    tokens = [t for part in tree[0::2] for t in part]
    parents = [p for part in tree[1::2] for p in part]
    for j in range(len(tokens)):
        text = [*prefix, *(tokens[i] for i in line(parents, j))]
        wanted = passes(runtime, text, ())[-1]
        torch.testing.assert_close(found[1 + j], wanted, atol=2e-4, rtol=1e-4)


def passes(runtime: Runtime, prefix: list[int], tree: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits after a prefix, and after each guess of a tree that is grown in several passes."""
    mirror = Mirror(runtime.pool.groups, None)
    law = SamplingSpec(max_tokens=64)
    work = Work(request=1, rows=((0, len(prefix) - 1),), tokens=tuple(prefix[:-1]), ahead=16)
    grants = tuple(Grant(1, g, 0, (1, 2, 3, 4, 5, 6)) for g in range(len(runtime.pool.groups)))
    enter = Enter(request=1, tokens=tuple(prefix), prompt=len(prefix), sampling=law, seed=3)
    mirror.follow(Plan(step=1, works=(work,), enter=(enter,), grants=grants))
    members = {"target": list(range(len(runtime.pool.groups)))}
    gather = Gather(mirror, runtime.pool, members, Read(runtime.decoder))
    say = Work(request=1, rows=((len(prefix) - 1, len(prefix)),), tokens=(), model="other", samples=True)
    with torch.inference_mode():
        ahead = Ahead(
            "target", runtime.decoder, gather, lambda d, b: d.forward(b, runtime.pool), [work, say],
            [WorkResult(rows=0), WorkResult(rows=0, tokens=(prefix[-1],))],
        )  # fmt: skip
        calls = ahead.calls([(1, Ask(np.array(prefix), len(prefix), 0, 16, law, 3))])
        found = [calls([(0, [prefix[-1]])]).clone()]
        for tokens, parents in zip(tree[0::2], tree[1::2], strict=True):
            found.append(calls.grow([(0, tokens, parents)]).clone())
    return torch.cat(found)


def test_the_race_s_ranks() -> None:
    """The first is the race's winner; fair ranks are draws without replacement, whose chances are the law's."""
    x = 1.5 * torch.randn(40, generator=torch.Generator().manual_seed(4))
    law, empty = SamplingSpec(temperature=0.8, top_k=12), np.empty(0, np.int64)
    p = dict(zip(*(v.tolist() for v in sampler.law(x, sampler.Row(law, 0, 0, empty, 0))), strict=True))
    for seed in range(50):
        row = sampler.Row(law, side_seed(seed, 9), 2, empty, 0)
        tokens, chances = sampler.ranked(x, row, 5, fair=True)
        assert tokens[0] == sampler.draw(x[None], [row])[0]
        assert len(set(tokens)) == 5
        assert chances == pytest.approx([p[t] for t in tokens])
        assert sampler.ranked(x, row, 5, fair=False)[0] == tokens
        assert len(sampler.ranked(x, row, 40, fair=True)[0]) == 12, "the law has no more"
    greedy = sampler.Row(SamplingSpec(temperature=0.0), 0, 0, empty, 0)
    assert sampler.ranked(x, greedy, 3, fair=False)[0] == x.topk(3).indices.tolist()
    assert sampler.ranked(x, greedy, 3, fair=True) == ([int(x.argmax())], [1.0])
    assert sampler.ranked(torch.full((4,), torch.nan), greedy, 3, fair=False) == ([], [])


def test_words_about_trees() -> None:
    parents = np.array([-1, -1, 0, 1, 0])
    assert candidates(parents, [-1]) == [0, 1]
    assert candidates(parents, [0, 1]) == [2, 3, 4]
    assert line(parents, 4) == [0, 4]
    assert line(parents, -1) == []
