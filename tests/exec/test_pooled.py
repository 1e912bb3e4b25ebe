"""Pooled hidden states: those of transformers, on kernels and on the reference operations, however a prompt is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.exec.conftest import Bench, spec
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.types import Finished, Preempted, Rejected

if TYPE_CHECKING:
    from tests.models.checkpoints import Checkpoint

PROMPTS = [[(7 * i + 13 * k) % 90 + 3 for i in range(40 + 9 * k)] for k in range(5)]
POOL: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1}


def vectors(bench: Bench, prompts: list[list[int]], pooling: str) -> list[torch.Tensor]:
    bench.run([spec(i, ids, pooling=pooling, **POOL) for i, ids in enumerate(prompts)])
    found = {e.id: e.vector for e in bench.events if isinstance(e, Finished)}
    return [torch.frombuffer(bytearray(found[i]), dtype=torch.float32) for i in range(len(prompts))]


def reference(checkpoint: Checkpoint, ids: list[int], pooling: str) -> torch.Tensor:
    inner: Any = checkpoint.model.model
    with torch.no_grad():
        states = inner(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    return states[-1] if pooling == "last" else states.double().mean(0).float()


@pytest.mark.parametrize("ops", ["auto", "ref"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("name", ["gemma2", "qwen3"])
def test_like_transformers(checkpoint: Callable[[str], Checkpoint], name: str, ops: str, pooling: str) -> None:
    """Gemma adds 1 to the weights of its norms; chunks of 16 rows, company in every step."""
    made = checkpoint(name)
    config = EngineConfig(
        model=made.folder, dtype="float32", device="cpu", threads=1, max_model_len=96, max_num_seqs=4, ops=ops
    )
    found = vectors(Bench(build(prepare(config)), max_rows=16), PROMPTS, pooling)
    for ids, vector in zip(PROMPTS, found, strict=True):
        want = reference(made, ids, pooling)
        assert (vector - want).abs().max() / want.norm() < 1e-5


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_neither_chunks_nor_company_nor_layers_matter(runtime: Runtime, layered_runtime: Runtime, pooling: str) -> None:
    whole = vectors(Bench(runtime), PROMPTS, pooling)
    parts = vectors(Bench(runtime, max_rows=7), PROMPTS, pooling)
    tight = Bench(runtime, blocks=7, max_rows=24, share=True)
    again = vectors(tight, PROMPTS, pooling)
    layered = vectors(Bench(layered_runtime, techniques=["schedule=layered"], max_rows=48), PROMPTS, pooling)
    for i, vector in enumerate(whole):
        assert (parts[i] - vector).abs().max() < 1e-6
        assert (again[i] - vector).abs().max() < 1e-6
        assert (layered[i] - vector).abs().max() < 1e-6


def test_a_preempted_mean_begins_anew(runtime: Runtime) -> None:
    """Another request of a higher priority takes the blocks while half of the prompt is summed up."""
    bench = Bench(runtime, blocks=8, max_rows=16)
    ids = [(11 * i) % 900 + 5 for i in range(100)]
    (want,) = vectors(Bench(runtime), [ids], "mean")

    def interrupt(b: Bench) -> None:
        if b.steps == 3:
            b.engine.abandon(b.engine.schedule(0.0)[0], 0.0)  # what an executor that broke off leaves behind

    (found,) = vectors_with(bench, ids, interrupt)
    assert (found - want).abs().max() < 1e-6


def vectors_with(bench: Bench, ids: list[int], each: Callable[[Bench], None]) -> list[torch.Tensor]:
    bench.run([spec(0, ids, pooling="mean", **POOL)], each)
    return [torch.frombuffer(bytearray(e.vector), dtype=torch.float32) for e in bench.events if isinstance(e, Finished)]


def test_a_mean_takes_no_prefix_and_leaves_one(runtime: Runtime) -> None:
    bench = Bench(runtime)
    first = vectors(bench, [PROMPTS[4]], "mean")
    hits = bench.engine.stats.prefix_hit_tokens
    bench.events.clear()
    assert torch.equal(vectors(bench, [PROMPTS[4]], "mean")[0], first[0])
    assert bench.engine.stats.prefix_hit_tokens == hits
    bench.events.clear()
    vectors(bench, [PROMPTS[4]], "last")
    assert bench.engine.stats.prefix_hit_tokens > hits


def test_it_is_one_sequence_of_one_token(runtime: Runtime) -> None:
    bench = Bench(runtime)
    for wrong in ({"n": 2, "max_tokens": 1}, {"max_tokens": 2}):
        (refused,) = bench.engine.add(spec(1, [5, 6], pooling="last", **wrong), 0.0)
        assert isinstance(refused, Rejected)
        assert refused.param == "pooling"
    assert not any(isinstance(event, Preempted) for event in bench.events)
