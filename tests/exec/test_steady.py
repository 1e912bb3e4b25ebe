"""Steps that are asked for tokens alone: their facts are those of the way of all steps, and who asks more gets it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from tests.exec.conftest import Bench, spec
from weft.config import build_stack
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.runner import TorchExecutor
from weft.exec.steady import Steadiness, Steady, plain
from weft.exec.thread import step
from weft.hub import resolve
from weft.types import Finished, Grammar, RequestSpec, SamplingSpec, TokenLogprob, Tokens, Work, WorkResult

SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}


def requests(count: int = 6, *, most: int = 60, **law: Any) -> list[RequestSpec]:
    """Greedy ones and drawn ones, whose answers end at different times; the third is of three sequences."""
    rng = random.Random(5)
    return [
        spec(
            i, [rng.randrange(3, 90) for _ in range(rng.randrange(2, 60))], seed=i, n=3 if i == 2 else 1,
            **{"max_tokens": rng.randrange(20, most), **(SAMPLED if i % 2 else {"temperature": 0.0}), **law},
        )
        for i in range(count)
    ]  # fmt: skip


@dataclass
class Seen:
    """Steps that were steady."""

    steps: int = 0


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Every steady step's facts are compared with those of the way of all steps, over the same logits."""
    seen, short, execute = Seen(), Steady.results, TorchExecutor.execute
    at_work: list[TorchExecutor] = []

    def both(steady: Steady, works: Sequence[Work], logits_NV: Tensor) -> list[WorkResult] | None:
        facts = short(steady, works, logits_NV)
        (executor,) = at_work
        assert executor._gather._standing is not None
        _, wanted = executor._gather._standing
        usual = executor._sampled(works, [(logits_NV, wanted)])
        executor._propose(works, usual, set())
        assert facts is None or facts == usual
        seen.steps += facts is not None
        return facts

    def watched(executor: TorchExecutor, plan: Any) -> Any:
        at_work[:] = [executor]
        return execute(executor, plan)

    monkeypatch.setattr(Steady, "results", both)
    monkeypatch.setattr(TorchExecutor, "execute", watched)
    return seen


def never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Steadiness, "of", lambda self, batch: None)


@pytest.mark.parametrize(
    "options",
    [{}, {"blocks": 14}, {"techniques": ["kv.store=int8"]}, {"techniques": ["schedule=sarathi"]}, {"max_rows": 10}],
    ids=["plain", "little room", "int8 rows", "another schedule", "ten rows a step"],
)
def test_facts_are_those_of_all_steps(
    runtime: Runtime, compared: Seen, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    found = Bench(runtime, **options).run(requests())
    assert compared.steps > 15
    never(monkeypatch)
    assert found == Bench(runtime, **options).run(requests())


@pytest.mark.parametrize(
    "law",
    [{"stop_ids": (5, 9, 11)}, {"top_k": 3}, {"min_p": 0.1}, {"stop_ids": (5,), "steered": True}, {"min_tokens": 9}],
    ids=["stop ids", "top_k", "min_p", "steered", "no end to ban"],
)
def test_laws_that_change_no_logit_are_steady(runtime: Runtime, compared: Seen, law: dict[str, Any]) -> None:
    Bench(runtime).run(requests(**law))
    assert compared.steps > 10


MORE: dict[str, dict[str, Any]] = {
    "bias": {"logit_bias": {7: 4.0}},
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 0.5},
    "frequency": {"frequency_penalty": 0.5},
    "logprobs": {"logprobs": 2},
    "a ban of end ids": {"min_tokens": 12, "stop_ids": (5, 9, 11)},
}


@pytest.mark.parametrize("law", MORE.values(), ids=MORE.keys())
def test_one_sequence_that_asks_more_has_it(
    runtime: Runtime, compared: Seen, monkeypatch: pytest.MonkeyPatch, law: dict[str, Any]
) -> None:
    """It runs longest, so that no step is steady, and the answers are what they are alone."""
    asking = spec(9, range(3, 40), seed=4, max_tokens=70, **SAMPLED, **law)
    bench = Bench(runtime)
    found = bench.run([asking, *requests(3)])
    assert compared.steps == 0
    alone = Bench(runtime)
    assert alone.run([asking])[9, 0] == found[9, 0]
    if "logprobs" in law:
        told = [event.logprobs for event in bench.events if isinstance(event, Tokens) and event.id == 9]
        assert all(isinstance(x, TokenLogprob) for chosen in told for x in chosen)
        assert sum(map(len, told)) == len(found[9, 0])


@pytest.mark.parametrize(
    "techniques",
    [
        ["draft=ngram"], ["skip=mue(after=(2,),threshold=0.9)"], ["kv.compress=streaming_llm(sinks=4,window=24,every=8)"],
    ],
    ids=["guesses", "early exits", "compression"],
)  # fmt: skip
def test_techniques_that_look_at_every_row(runtime: Runtime, compared: Seen, techniques: list[str]) -> None:
    Bench(runtime, techniques=techniques).run(requests(3))
    assert compared.steps == 0


def test_tokens_that_are_set_beforehand(runtime: Runtime, compared: Seen) -> None:
    asked = msgspec.structs.replace(spec(1, range(3, 40), max_tokens=40), forced=tuple(range(8, 40)))
    assert Bench(runtime).run([asked])[1, 0][:32] == list(range(8, 40))
    assert compared.steps == 0


@pytest.mark.parametrize(
    "more",
    [
        {"grammar": Grammar("regex", "a+")},
        {"count": [12]},
        {"sampling": SamplingSpec(pooling="last")},
        {"stack": build_stack(["kv.compress=streaming_llm"])},
        {"stack": build_stack(["sample=cad"])},
    ],
    ids=["a grammar", "entries that were dropped", "pooled states", "entries to drop", "a law of its own"],
)
def test_what_else_a_sequence_may_have(runtime: Runtime, more: dict[str, Any]) -> None:
    bench, found = Bench(runtime), list[tuple[bool, bool]]()

    def each(bench: Bench) -> None:
        for s in bench.executor.mirror.sequences.values():
            before = plain(s)
            kept = {name: getattr(s, name) for name in more}
            for name, value in more.items():
                setattr(s, name, value)
            found.append((before, plain(s)))
            for name, value in kept.items():
                setattr(s, name, value)

    bench.run([spec(1, range(3, 40), max_tokens=5)], each)
    assert set(found) == {(True, False)}


def test_who_watches_sees_every_row(runtime: Runtime, compared: Seen) -> None:
    """A probe that comes while a batch stands: from then on no step is steady."""
    bench, rows = Bench(runtime), list[int]()

    def each(bench: Bench) -> None:
        if bench.steps == 20:
            bench.executor.watch(lambda s, output, logits_V: rows.append(output))
        if bench.steps == 30:
            bench.executor.watch(None)

    bench.run([spec(1, range(3, 40), seed=4, max_tokens=50, **SAMPLED)], each)
    assert rows == list(range(20, 30))
    assert 35 < compared.steps <= 40


def test_sequences_that_are_linked_share_a_token(runtime: Runtime, compared: Seen) -> None:
    """From the step on in which a program says so, though the batch stands."""
    bench = Bench(runtime)

    def each(bench: Bench) -> None:
        if bench.steps == 20:
            bench.engine.link([(1, 0), (2, 0)])

    found = bench.run([spec(i, range(3, 40 + i), seed=i, max_tokens=40, **SAMPLED) for i in (1, 2)], each)
    assert found[1, 0][:20] != found[2, 0][:20]
    assert found[1, 0][20:] == found[2, 0][20:]
    assert 10 < compared.steps <= 20


def test_logits_that_are_no_numbers_end_their_sequences(compared: Seen) -> None:
    config = EngineConfig(
        model=resolve(None), dtype="float32", max_model_len=256, max_num_seqs=8, device="cpu", threads=1
    )
    runtime = build(prepare(config))
    bench = Bench(runtime)
    for each in requests(3, most=30):
        bench.events += bench.engine.add(each, 0.0)
    for n in range(40):
        if n == 10:
            runtime.pool.arena.view(torch.float32).fill_(float("nan"))  # the keys and values of all
        bench.events += step(bench.engine, bench.executor)[0]
    assert not bench.engine.has_work
    ends = [event for event in bench.events if isinstance(event, Finished)]
    assert len(ends) == 5
    assert all(end.reason == "error" and "not a finite number" in str(end.error) for end in ends)
    assert compared.steps > 3
