"""A batch that stands has the numbers of a new one, in every step; and answers do not depend on whether it does."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.exec.conftest import Bench, spec
from weft.exec.batch import Batch
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.gather import Gather, Wanted
from weft.models import ropes
from weft.models.native_step import NativeStep
from weft.types import GroupKind, Preempted, RequestSpec, Work

if TYPE_CHECKING:
    from tests.models.checkpoints import Checkpoint

SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}


def requests(seed: int = 3, *, most: int = 60) -> list[RequestSpec]:
    """Answers that end at different times, across the ends of blocks; the third is of three sequences."""
    rng = random.Random(seed)
    return [
        spec(
            i, [rng.randrange(3, 90) for _ in range(rng.randrange(2, 60))], seed=i, n=3 if i == 2 else 1,
            max_tokens=rng.randrange(5, most), **(SAMPLED if i % 2 else {"temperature": 0.0}),
        )
        for i in range(6)
    ]  # fmt: skip


@dataclass
class Seen:
    """Steps whose batch stood, and steps for which one was built."""

    stood: int = 0
    built: int = 0


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Every batch of the target is compared with one that is built for its step."""
    seen, step = Seen(), Gather.step

    def watched(gather: Gather, name: str, works: Sequence[Work], mine: Sequence[int]) -> tuple[Batch, list[Wanted]]:
        batch, wanted = step(gather, name, works, mine)
        new, rows = gather.batch(name, works, mine)
        assert wanted == rows
        assert batch.bounds == new.bounds
        assert all(a is b for a, b in zip(batch.sequences, new.sequences, strict=True))
        pairs = [(batch.tokens_T, new.tokens_T), (batch.positions_T, new.positions_T)]
        for mine_, theirs in zip(batch.groups, new.groups, strict=True):
            width = theirs.tables_SB.shape[1]
            assert not mine_.tables_SB[:, width:].any()
            pairs += [
                (mine_.tables_SB[:, :width], theirs.tables_SB), (mine_.first_S, theirs.first_S),
                (mine_.lengths_S, theirs.lengths_S), (mine_.slots_T, theirs.slots_T),
            ]  # fmt: skip
        assert all(torch.equal(a, b) for a, b in [*pairs, (batch.logit_rows_N, new.logit_rows_N)])
        seen.stood += batch.stands
        seen.built += not batch.stands
        return batch, wanted

    monkeypatch.setattr(Gather, "step", watched)
    return seen


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, every step's batch is built."""
    return lambda: monkeypatch.setattr(Gather, "step", Gather.batch)


# Options of an engine, and how many of its steps have a batch that stands, at least.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 15),
    "ten rows a step": ({"max_rows": 10}, 15),
    "little room": ({"blocks": 14}, 15),
    "int8 rows": ({"techniques": ["kv.store=int8"]}, 15),
    "the newest entries": ({"techniques": ["kv.compress=streaming_llm(sinks=4,window=24,every=8)"]}, 15),
    "heavy hitters": ({"techniques": ["kv.compress=h2o(heavy=12,recent=12,every=8,observe=16)"], "share": False}, 0),
    "guesses": ({"techniques": ["draft=ngram"]}, 0),
}


@pytest.mark.parametrize(("options", "stood"), CASES.values(), ids=CASES.keys())
def test_it_has_the_numbers_of_a_new_one(
    runtime: Runtime, compared: Seen, anew: Callable[[], None], options: dict[str, Any], stood: int
) -> None:
    bench = Bench(runtime, **options)
    found = bench.run(requests())
    assert compared.stood >= stood
    assert compared.built > 3
    assert any(isinstance(event, Preempted) for event in bench.events) == ("blocks" in options)
    anew()
    assert found == Bench(runtime, **options).run(requests())


def test_two_threads_that_part_a_sequences_chunks(runtime: Runtime, compared: Seen, anew: Callable[[], None]) -> None:
    """One sequence and then several, of up to five chunks, whose parts are put together anew in every step."""
    both = build(prepare(replace(runtime.setup.config, threads=2)))
    asked = [spec(9, range(3, 90), max_tokens=200), *requests(most=200)]
    found = Bench(both, max_rows=64).run(asked)
    assert compared.stood > 150
    anew()
    assert found == Bench(both, max_rows=64).run(asked)
    assert found == Bench(runtime).run(asked)


@pytest.mark.parametrize("ops", ["auto", "ref"])
@pytest.mark.parametrize("name", ["mistral", "qwen3_window"])
def test_windows_that_slide(
    checkpoint: Callable[[str], Checkpoint], compared: Seen, anew: Callable[[], None], name: str, ops: str
) -> None:
    """Tables whose heads are dropped, beside those of layers that see everything."""
    config = EngineConfig(
        model=checkpoint(name).folder,
        dtype="float32",
        device="cpu",
        threads=1,
        max_model_len=256,
        max_num_seqs=8,
        ops=ops,
    )
    runtime = build(prepare(config))
    assert any(group.window for group in runtime.pool.groups if group.kind is not GroupKind.PARKED)
    found = Bench(runtime).run(requests(most=90))
    assert compared.stood > compared.built > 3
    anew()
    assert found == Bench(runtime).run(requests(most=90))


def test_positions_beyond_the_tables_that_are_kept(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, compared: Seen
) -> None:
    """Their angles are computed in every pass; the answers are the same."""
    want = Bench(runtime).run(requests())
    monkeypatch.setattr(ropes, "KEPT_POSITIONS", 75)
    asked: list[bool] = []
    again = NativeStep.again
    monkeypatch.setattr(NativeStep, "again", lambda step: asked.append(again(step)) or asked[-1])
    decoder = build(prepare(runtime.setup.config))
    assert Bench(decoder).run(requests()) == want
    assert asked.count(False) > 3
    assert asked.count(True) > 3


def test_a_request_that_comes_again_is_another_sequence(runtime: Runtime, compared: Seen) -> None:
    """With its id, at the place where the first one was: nothing of that one's tables is left."""
    prompts = [list(range(10, 30)), list(range(40, 75))]
    alone = [Bench(runtime).run([spec(1, ids, max_tokens=9)])[1, 0] for ids in prompts]
    bench = Bench(runtime)
    for ids in prompts:
        found = bench.run([spec(1, ids, max_tokens=9)])
    assert found[1, 0] == alone[0] + alone[1]
    assert compared.stood > compared.built
