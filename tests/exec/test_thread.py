"""The engine's thread: commands in, frames out, and what happens when something breaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import pytest

from weft.config import Limits
from weft.core.engine import Engine
from weft.exec.null import NullExecutor, reference
from weft.exec.thread import EngineThread
from weft.types import (
    Adapted,
    Add,
    Cancel,
    EngineFrame,
    Finished,
    GroupKind,
    GroupSpec,
    Load,
    Plan,
    Rejected,
    RequestSpec,
    SamplingSpec,
    StepResult,
    TokenItem,
    Tokens,
)

GROUPS = [GroupSpec(name="full", kind=GroupKind.FULL, layers=(0,), entry_bytes=8, block_tokens=4)]


class Listener:
    def __init__(self) -> None:
        self.frames: list[EngineFrame] = []
        self.changed = threading.Condition()

    def __call__(self, frame: EngineFrame) -> None:
        with self.changed:
            self.frames.append(frame)
            self.changed.notify_all()

    @property
    def events(self) -> list[object]:
        return [e for f in self.frames for e in f.events]

    def wait(self, ready: Callable[[], bool], timeout_s: float = 20) -> None:
        with self.changed:
            assert self.changed.wait_for(ready, timeout_s), "nothing came"


def start(executor: NullExecutor | None = None, *, foretell: bool = False) -> tuple[EngineThread, Listener]:
    engine = Engine(GROUPS, 64, Limits(max_model_len=64, max_num_seqs=4, max_rows=16, max_samples=8), vocab=32)
    port = EngineThread(engine, executor or NullExecutor(GROUPS, vocab=32), SimpleNamespace(), foretell=foretell)
    listener = Listener()
    port.subscribe(listener)
    return port, listener


def request(id: int, prompt: tuple[int, ...] = (1, 2, 3), **law: object) -> Add:
    return Add(RequestSpec(id=id, items=(TokenItem(prompt),), sampling=SamplingSpec(**law), seed=id))  # type: ignore[arg-type]


def test_requests_finish_and_the_thread_goes_idle() -> None:
    port, listener = start()
    try:
        for i in range(20):
            port.send(request(i, max_tokens=9))
        listener.wait(lambda: sum(isinstance(e, Finished) for e in listener.events) == 20)
        for i in range(20):
            got = [t for e in listener.events if isinstance(e, Tokens) and e.id == i for t in e.tokens]
            assert got == reference((1, 2, 3), SamplingSpec(max_tokens=9), i, 32)
        deadline = time.monotonic() + 10
        while port.stalled_s() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert port.stalled_s() == 0.0
        assert port.stats.generation_tokens == 180
        assert port.stats.kv_blocks_referenced == 0
        assert port.stats.finished == 20
        assert port.error() is None
    finally:
        port.close()


def test_what_is_foretold_of_prompts_is_how_far_they_are() -> None:
    """Before each plan, of whoever has more to compute than one row; who only decodes costs a frame nothing."""
    port, listener = start(foretell=True)
    try:
        port.send(request(1, tuple(range(30)) + (1,) * 15, max_tokens=6))
        listener.wait(lambda: any(isinstance(e, Finished) for e in listener.events))
        assert [f.behind for f in listener.frames if f.behind] == [((1, 0, 16),), ((1, 16, 32),), ((1, 32, 45),)]
        port.send(request(2, (1, 2), max_tokens=50))
        port.send(request(3, tuple(range(2, 32)) + (2,) * 10, max_tokens=2))
        listener.wait(lambda: sum(isinstance(e, Finished) for e in listener.events) == 3)
        told = [one for f in listener.frames for one in f.behind if one[0] == 3]
        assert told[0][1] == 0
        assert told[-1][2] == 40
        assert all(before[2] == after[1] for before, after in pairwise(told))
    finally:
        port.close()


def test_cancel_frees_and_says_nothing_more() -> None:
    port, listener = start()
    try:
        port.send(request(1, max_tokens=50))
        port.send(request(2, max_tokens=50))
        port.send(Cancel(1))
        port.send(Cancel(99))
        listener.wait(lambda: any(isinstance(e, Finished) and e.id == 2 for e in listener.events))
        assert not any(isinstance(e, Finished) and e.id == 1 for e in listener.events)
    finally:
        port.close()


@pytest.mark.parametrize(
    ("prompt", "law", "code"),
    [((), {}, None), ((1, 32), {}, None), ((-2,), {}, None), (tuple([1] * 64), {}, "context_length_exceeded")],
)
def test_bad_requests_are_rejected_and_others_go_on(
    prompt: tuple[int, ...], law: dict[str, int], code: str | None
) -> None:
    port, listener = start()
    try:
        port.send(request(1, prompt, **law))
        port.send(request(2, max_tokens=3))
        listener.wait(lambda: any(isinstance(e, Finished) and e.id == 2 for e in listener.events))
        (rejected,) = [e for e in listener.events if isinstance(e, Rejected)]
        assert rejected.id == 1
        assert rejected.code == code
        assert rejected.message
    finally:
        port.close()


class Breaks(NullExecutor):
    def execute(self, plan: Plan) -> StepResult:
        if plan.step > 3:
            raise RuntimeError("the card fell off the bus")
        return super().execute(plan)


def test_a_broken_executor_ends_every_request_with_its_reason() -> None:
    port, listener = start(Breaks(GROUPS, vocab=32))
    try:
        for i in range(6):
            port.send(request(i, max_tokens=40))
        listener.wait(lambda: sum(isinstance(e, Finished) for e in listener.events) == 6)
        assert all(
            e.reason == "error" and "fell off" in str(e.error) for e in listener.events if isinstance(e, Finished)
        )
        assert "fell off" in str(port.error())
        port.send(Load(6, "a", "a"))
        port.send(Add(RequestSpec(id=7, items=(TokenItem((1, 2)),), n=2)))
        listener.wait(lambda: sum(isinstance(e, Finished) and e.id == 7 for e in listener.events) == 2)
        (adapted,) = [e for e in listener.events if isinstance(e, Adapted)]
        assert adapted.id == 6
        assert "fell off" in str(adapted.error)
    finally:
        port.close()


class Slow(NullExecutor):
    def execute(self, plan: Plan) -> StepResult:
        if plan.works:
            time.sleep(0.5)
        return super().execute(plan)


def test_a_step_that_takes_long_shows() -> None:
    port, listener = start(Slow(GROUPS, vocab=32))
    try:
        port.send(request(1, max_tokens=2))
        time.sleep(0.3)
        assert port.stalled_s() > 0.1
        listener.wait(lambda: any(isinstance(e, Finished) for e in listener.events))
    finally:
        port.close()
    assert port.error() is None
