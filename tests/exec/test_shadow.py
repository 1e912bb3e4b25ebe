"""Shadow checks: the drift of a stack as a live engine tells it, beside the same figure worked out by hand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import msgspec
import pytest
import torch

from tests.exec.conftest import STORY, spec
from weft.adapt.lora import LoRA
from weft.conform.lab import kl
from weft.errors import CapacityError, ConfigError
from weft.exec.build import EngineConfig, Runtime, build, prepare
from weft.exec.shadow import MOST_TOKENS, Shadow, planned, reference
from weft.exec.thread import EngineThread, step
from weft.front.tokenizer import Tokenizer
from weft.hub import resolve
from weft.types import Add, Cancel, Finished, RequestSpec


def runtime_of(techniques: Sequence[str]) -> Runtime:
    config = EngineConfig(
        model=resolve(None),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        device="cpu",
        threads=1,
        techniques=techniques,
        draft_control="off",  # whether anything is guessed does not hang on measured times then
    )
    return build(prepare(config))


def ids(count: int) -> list[int]:
    return Tokenizer.load(resolve(None)).encode(STORY, add_special=False)[:count]


def requests(count: int, **law: object) -> list[RequestSpec]:
    text = ids(120)
    return [spec(i + 1, text[3 * i : 60 + 3 * i], seed=i, max_tokens=6 + i, **law) for i in range(count)]


def serve(runtime: Runtime, specs: Sequence[RequestSpec], shadow: Shadow) -> EngineThread:
    """Everything asked of an engine thread, answered, and checked."""
    thread = EngineThread(runtime.engine, runtime.executor, None, shadow=shadow)
    ended: set[int] = set()
    thread.subscribe(lambda frame: ended.update(e.id for e in frame.events if isinstance(e, Finished)))
    for one in specs:
        thread.send(Add(one))
    until = time.monotonic() + 60
    while time.monotonic() < until and not (len(ended) == len(specs) and not shadow.busy):
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(ended) == len(specs)
    return thread


def test_the_drift_is_the_divergence_from_the_reference_path() -> None:
    """Every request is checked; the same laws, taken in two engines by hand, have the same mean divergence."""
    specs = requests(4, temperature=0.0)
    runtime = runtime_of(["kv.store=int8"])
    shadow = Shadow(runtime, 1.0)
    thread = serve(runtime, specs, shadow)
    stats = thread.stats
    thread.close()
    assert stats.shadow_requests == len(specs)
    assert stats.shadow_tokens == sum(s.sampling.max_tokens for s in specs)

    mine = runtime_of(["kv.store=int8"])
    laws: dict[tuple[int, int], torch.Tensor] = {}
    mine.executor.watch(lambda s, output, x: laws.__setitem__((s.seed, output), x.float().clone()))
    outputs = answers(mine, specs)
    plain = runtime_of([])
    true: dict[tuple[int, int], torch.Tensor] = {}
    plain.executor.watch(lambda s, output, x: true.__setitem__((s.seed, output), x.float().clone()))
    answers(plain, [msgspec.structs.replace(s, forced=tuple(outputs[s.id])) for s in specs])
    means = [fmean(kl({k: true[k] for k in true if k[0] == s.seed}, laws)) for s in specs]
    assert stats.shadow_kl == pytest.approx(fmean(means), rel=1e-6)
    assert 0 < stats.shadow_kl < 1e-3


def answers(runtime: Runtime, specs: Sequence[RequestSpec]) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {s.id: [] for s in specs}
    for one in specs:
        assert runtime.engine.add(one, 0.0) == []
    while runtime.engine.has_work:
        events, _ = step(runtime.engine, runtime.executor)
        for event in events:
            out[event.id] += getattr(event, "tokens", ())
    return out


@pytest.mark.parametrize(("alarm", "raised"), [(1e-9, 1), (1.0, 0)])
def test_the_alarm_is_raised_above_its_threshold(alarm: float, raised: int, caplog: pytest.LogCaptureFixture) -> None:
    runtime = runtime_of(["kv.store=int8"])
    thread = serve(runtime, requests(2), Shadow(runtime, 1.0, alarm))
    assert thread.stats.shadow_alarm == raised
    thread.close()
    assert ("drifts" in caplog.text) is bool(raised)


def test_an_exact_stack_does_not_drift() -> None:
    runtime = runtime_of(["draft=ngram(shortest=1)"])
    thread = serve(runtime, requests(3, temperature=0.0), Shadow(runtime, 1.0))
    assert thread.stats.shadow_tokens > 0
    assert thread.stats.shadow_kl == 0.0
    assert thread.stats.shadow_top1 == 1.0
    assert thread.stats.acts["draft=ngram.accepted"] > 0, "no guess stood, so nothing is shown"
    thread.close()


def test_adapters_are_no_drift(tmp_path: Path) -> None:
    """The reference path computes with the adapters that the live engine has, loaded later or the server's own."""
    LoRA.trial(tmp_path)
    for techniques, own in (([], ("adapt=lora(name='x')",)), ([f"adapt=lora(name='x', path={str(tmp_path)!r})"], ())):
        runtime = runtime_of([*techniques, "draft=ngram(shortest=1)"])
        shadow = Shadow(runtime, 1.0)
        book = runtime.adapters
        assert book is not None
        book.enter(book.read("x", str(tmp_path)))
        sent = [msgspec.structs.replace(s, techniques=own) for s in requests(2, temperature=0.0)]
        thread = serve(runtime, sent, shadow)
        assert thread.stats.shadow_requests == 2
        assert thread.stats.shadow_kl == 0.0
        assert thread.stats.acts["adapt=lora.rows_adapted"] > 0
        assert thread.stats.acts["draft=ngram.proposed"] > 0
        thread.close()


def test_a_share_of_the_requests_is_checked() -> None:
    runtime = runtime_of([])
    shadow = Shadow(runtime, 0.3)
    sampled = []
    for one in [spec(i, ids(8), seed=i, max_tokens=1) for i in range(1, 401)]:
        runtime.engine.add(one, 0.0)
        before = len(shadow._open) + shadow.skipped
        shadow.admit(one)
        sampled.append(len(shadow._open) + shadow.skipped - before)
    assert 85 <= sum(sampled) <= 155


def test_what_cannot_be_checked_is_left_out_and_counted() -> None:
    """Several sequences, and a request that is cancelled in the middle, leave nothing behind."""
    runtime = runtime_of([])
    shadow = Shadow(runtime, 1.0)
    thread = serve(runtime, requests(1), shadow)
    thread.send(Add(msgspec.structs.replace(requests(1)[0], id=50, n=2)))
    thread.send(Add(spec(51, ids(60), max_tokens=150, stop_ids=())))
    time.sleep(0.2)
    thread.send(Cancel(51))
    until = time.monotonic() + 30
    while time.monotonic() < until and (thread.stats.running or thread.stats.waiting):
        time.sleep(0.01)
    thread.close()
    assert shadow.skipped == 1
    assert not shadow._open
    assert not shadow._rids


def test_only_the_first_tokens_are_kept() -> None:
    runtime = runtime_of([])
    shadow = Shadow(runtime, 1.0)
    thread = serve(runtime, [spec(1, ids(20), max_tokens=MOST_TOKENS + 20)], shadow)
    assert thread.stats.shadow_tokens == MOST_TOKENS
    thread.close()


def test_the_plan_counts_the_reference_engine() -> None:
    setup = prepare(EngineConfig(model=resolve(None), dtype="float32", max_model_len=256, device="cpu", threads=1))
    wider = planned(setup)
    runtime = build(wider)
    made = reference(runtime)
    more = wider.plan.total_bytes - setup.plan.total_bytes
    assert more == made.pool.bytes + made.decoder.workspace_bytes
    assert made.decoder.tensors is runtime.decoder.tensors
    from dataclasses import replace

    tight = replace(setup, plan=replace(setup.plan, available_bytes=setup.plan.total_bytes + 1))
    with pytest.raises(CapacityError, match="--shadow"):
        planned(tight)


@pytest.mark.parametrize(("share", "alarm"), [(0.0, None), (1.5, None), (-1.0, None), (0.5, 0.0), (0.5, float("nan"))])
def test_shares_and_alarms_that_make_no_sense(runtime: Runtime, share: float, alarm: float | None) -> None:
    with pytest.raises(ConfigError, match="--shadow"):
        Shadow(runtime, share, alarm)
